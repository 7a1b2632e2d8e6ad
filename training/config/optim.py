"""The section [optim]: the optimizer and its learning-rate schedule."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from turnout.moe.config import STRICT

# The kind of tensor that is the fp32 weight itself; the optimizer names the others.
MASTER = "master"


class ScheduleConfig(BaseModel):
    """Learning rate over steps. wsd: warm-up, stable, decay."""

    model_config = STRICT

    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final_frac: float = Field(default=0.1, ge=0, le=1)  # of the peak, at the last step
    decay_frac: float | None = Field(default=None, gt=0, le=1)  # of n_steps; wsd only

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.kind == "wsd" and self.decay_frac is None:
            raise ValueError("kind=wsd needs decay_frac, the share of steps spent decaying; 0.2 is usual")
        if self.kind != "wsd" and self.decay_frac is not None:
            raise ValueError(f"decay_frac={self.decay_frac} has no effect with kind={self.kind}; drop it")
        return self


class OptimConfig(BaseModel):
    """AdamW (Loshchilov and Hutter 2019)."""

    model_config = STRICT

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must each be at least 0 and below 1; use [0.9, 0.95]")
        return self
