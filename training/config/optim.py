"""The section [optim]: the optimizer and its learning-rate schedule."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from turnout.moe.config import STRICT

# The kind of optimizer tensor that holds the fp32 weights; the optimizer names the other kinds. Here because
# training/engine and training/checkpoint both need it, and the engine must not import checkpoints.
MASTER = "master"


class ScheduleConfig(BaseModel):
    """Learning rate over steps (training/optimizers/schedule.py)."""

    model_config = STRICT

    # Shape of the decay after warm-up. cosine and linear decay from the end of warm-up on. wsd (warm-up,
    # stable, decay) stays at the peak first and decays linearly over the last decay_frac of the steps.
    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    # Optimizer steps over which the learning rate rises linearly to its peak.
    warmup_steps: int = Field(default=0, ge=0)
    # Learning rate at the last step, as a fraction of the peak.
    final_frac: float = Field(default=0.1, ge=0, le=1)
    # Length of the decay, as a fraction of train.n_steps. Required by kind=wsd, not allowed otherwise.
    decay_frac: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.kind == "wsd" and self.decay_frac is None:
            raise ValueError("kind=wsd needs decay_frac, the fraction of steps spent decaying; 0.2 is usual")
        if self.kind != "wsd" and self.decay_frac is not None:
            raise ValueError(f"decay_frac={self.decay_frac} has no effect with kind={self.kind}; drop it")
        return self


class OptimConfig(BaseModel):
    """AdamW (Loshchilov and Hutter 2019)."""

    model_config = STRICT

    # Peak learning rate.
    lr: float = Field(gt=0)
    # Decay rates of the first and second moment, per step.
    betas: tuple[float, float] = (0.9, 0.95)
    # Added to the square root of the second moment before dividing by it.
    eps: float = Field(default=1e-8, gt=0)
    # Decoupled weight decay of matrices (embeddings and experts included); norms and biases have none.
    weight_decay: float = Field(default=0.1, ge=0)
    # How the learning rate changes over the run.
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must each be at least 0 and below 1; use [0.9, 0.95]")
        return self
