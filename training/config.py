"""The configuration tree: the only schema of a run.

Values are checked field by field and across fields here; what also needs the number of ranks is checked in
training/parallel.py, what needs the corpus in launch/preflight.py. Reading files and `--set` is
launch/settings.py.
"""

from typing import Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from moe.config import STRICT, ModelConfig


class ParallelConfig(BaseModel):
    model_config = STRICT

    tp: PositiveInt = 1
    ep: PositiveInt = 1
    sequence_parallel: bool = False  # norms and residuals hold 1 / tp of the tokens
    zero_stage: Literal[1, 2] = 1  # 0 clips by a wrong norm in DeepSpeed 0.19.8 once experts are split
    timeout_s: PositiveInt = 600  # how long a collective waits for a rank before it is taken for dead


class TrainConfig(BaseModel):
    model_config = STRICT

    n_steps: PositiveInt
    batch_tokens: PositiveInt  # per optimizer step, all ranks
    microbatch_seqs: PositiveInt  # per rank and forward
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)  # None: no clipping
    expert_backend: Literal["reference", "grouped"] = "grouped"
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in backward


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


class DataConfig(BaseModel):
    model_config = STRICT

    corpus: str  # directory written by `turnout prepare`
    seed: int = Field(default=0, ge=0)
    attend_across_documents: bool = False
    verify: Literal["checksum", "size"] = "checksum"  # of every shard, at start


class EvalConfig(BaseModel):
    model_config = STRICT

    every_steps: PositiveInt | None = None  # None: only after the last step
    max_documents: PositiveInt | None = None  # None: the whole validation split


class SampleConfig(BaseModel):
    """Continuations written after the last step."""

    model_config = STRICT

    prompts: tuple[str, ...] = ()
    n_tokens: PositiveInt = 64
    temperature: float = Field(default=0.8, ge=0)  # 0: greedy
    top_p: float = Field(default=0.95, gt=0, le=1)


class LogConfig(BaseModel):
    model_config = STRICT

    every_steps: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


class RunConfig(BaseModel):
    """Everything that decides what a run computes."""

    model_config = STRICT

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_seqs(self) -> int:
        """Sequences per optimizer step, all ranks."""
        return self.train.batch_tokens // self.model.seq_len

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        batch_tokens, seq_len = self.train.batch_tokens, self.model.seq_len
        if batch_tokens % seq_len:
            below = batch_tokens // seq_len * seq_len
            raise ValueError(
                f"train.batch_tokens={batch_tokens} must be a multiple of model.seq_len={seq_len}; "
                f"use {below or seq_len} or {below + seq_len}"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        warmup_steps, n_steps = self.optim.schedule.warmup_steps, self.train.n_steps
        if warmup_steps >= n_steps:
            raise ValueError(
                f"optim.schedule.warmup_steps={warmup_steps} must be below train.n_steps={n_steps}; "
                f"use at most {n_steps - 1}"
            )
        decay_frac = self.optim.schedule.decay_frac
        if decay_frac is not None and round(decay_frac * n_steps) < 2:
            raise ValueError(
                f"optim.schedule.decay_frac={decay_frac} of train.n_steps={n_steps} decays for less than two "
                f"steps; use at least {2 / n_steps:.2g}"
            )
        return self

    @model_validator(mode="after")
    def _check_expert_backend(self) -> Self:
        d_model, d_expert = self.model.d_model, self.model.d_expert
        if self.train.expert_backend == "grouped" and (d_model % 8 or d_expert % 8):
            raise ValueError(
                f"train.expert_backend=grouped needs multiples of 8, not model.d_model={d_model} and "
                f"model.d_expert={d_expert}; change them, or use train.expert_backend=reference"
            )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.sample.prompts and self.sample.n_tokens >= self.model.seq_len:
            raise ValueError(
                f"sample.n_tokens={self.sample.n_tokens} must be below model.seq_len={self.model.seq_len}; "
                f"use at most {self.model.seq_len - 1}"
            )
        return self
