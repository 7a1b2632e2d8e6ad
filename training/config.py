"""The configuration tree: the only schema of a run.

Values are checked field by field and across fields here; what also needs the number of ranks is checked in
training/layout.py, what needs the corpus in launch/preflight.py. Reading files and `--set` is
launch/settings.py.
"""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from moe.backends import MAX_PLACES, NEEDS
from moe.config import STRICT, ModelConfig


class ParallelConfig(BaseModel):
    model_config = STRICT

    tp: PositiveInt = 1
    ep: PositiveInt = 1
    sequence_parallel: bool = False  # norms and residuals hold 1 / tp of the tokens
    # Expert rows a rank takes at once, over the mean of the ranks; more come in further trips, which are
    # computed again in backward, so that no routing is out of memory. None: all at once.
    ep_max_load: float | None = Field(default=2.0, gt=0, allow_inf_nan=False)
    ep_trips: PositiveInt = 1  # rows go in so many trips, each of which travels while others are computed
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
    # auto: in half precision on a GPU from sm_80 on triton_grouped or torch_grouped, else sorted_loop
    expert_backend: Literal[
        "auto",
        "reference",
        "sorted_loop",
        "compiled_loop",
        "torch_grouped",
        "megablocks",
        "triton_grouped",
    ] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in backward
    # Blocks by torch.compile, and the loss where parallel.tp=1: a slower first step, faster ones after it.
    compile: bool = False


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


class CheckpointConfig(BaseModel):
    model_config = STRICT

    every_steps: PositiveInt | None = None  # None: only after the last step
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None  # those of these steps are kept for ever
    is_async: bool = True

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        every, kept = self.every_steps, self.keep_every_steps
        if kept is None:
            return self
        if every is None:
            raise ValueError(
                f"keep_every_steps={kept} has no effect without every_steps; set it, or drop this"
            )
        if kept % every:
            below = kept // every * every
            fits = f"{below} or {below + every}" if below else every
            raise ValueError(f"keep_every_steps={kept} must be a multiple of every_steps={every}; use {fits}")
        return self


class SampleConfig(BaseModel):
    """Continuations written after the last step."""

    model_config = STRICT

    prompts: tuple[str, ...] = ()
    n_tokens: PositiveInt = 64
    temperature: float = Field(default=0.8, ge=0)  # 0: greedy
    top_p: float = Field(default=0.95, gt=0, le=1)


# What these settings of GuardConfig are where they are at work and were not given.
GUARD_DEFAULTS: dict[str, float] = {
    "spike_sigma": 6.0,
    "spike_window_steps": 100,
    "collapse_patience_steps": 50,
    "skip_window_steps": 1,
    "max_interventions": 5,
}


class GuardConfig(BaseModel):
    """What is taken for training gone wrong (training/guard.py), and what is then done.

    skip: the step's update is not applied. rollback: back to the last checkpoint, and the data of the steps
    that led here is left out. A setting that is not at work is None; one that is at work never is, but for
    max_load_frac and max_dead_frac, of which one is enough.
    """

    model_config = STRICT

    on_non_finite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["off", "stop", "skip", "rollback"] = "off"
    spike_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # standard deviations
    spike_window_steps: int | None = Field(default=None, ge=2)  # of the mean; none is found before so many
    # The updates that led to a collapse are past, so that skipping one would mend nothing.
    on_collapse: Literal["off", "stop", "rollback"] = "off"
    max_load_frac: float | None = Field(default=None, gt=0, lt=1)  # of a layer's rows, to one expert
    max_dead_frac: float | None = Field(default=None, ge=0, lt=1)  # of a layer's experts, without any row
    collapse_patience_steps: PositiveInt | None = None
    skip_window_steps: PositiveInt | None = None  # data left out by a rollback, the offending step the last
    max_interventions: PositiveInt | None = None  # skips and rollbacks of a run; at the next it stops

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Give what is at work its default here, so that the resolved config holds it."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        idle = _idle_guard_settings(
            *(given.get(f"on_{kind}") for kind in ("non_finite", "spike", "collapse"))
        )
        return {name: value for name, value in GUARD_DEFAULTS.items() if name not in idle} | given

    @model_validator(mode="after")
    def _check_effect(self) -> Self:
        idle = _idle_guard_settings(self.on_non_finite, self.on_spike, self.on_collapse)
        for name, remedy in idle.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)} has no effect {remedy}, or drop it")
        if self.on_collapse != "off" and self.max_load_frac is None and self.max_dead_frac is None:
            raise ValueError(
                f"on_collapse={self.on_collapse} needs max_load_frac, max_dead_frac or both; "
                "max_dead_frac=0.5 finds a layer that uses less than half of its experts"
            )
        return self


def _idle_guard_settings(on_non_finite: Any, on_spike: Any, on_collapse: Any) -> dict[str, str]:
    """Return the settings that these actions leave without effect, each with why and the way out."""
    actions = (on_non_finite, on_spike, on_collapse)
    idle: dict[str, str] = {}
    if on_spike in (None, "off"):
        spike = ("spike_sigma", "spike_window_steps")
        idle |= dict.fromkeys(spike, "with on_spike=off; set on_spike to stop, skip or rollback")
    if on_collapse in (None, "off"):
        collapse = ("max_load_frac", "max_dead_frac", "collapse_patience_steps")
        idle |= dict.fromkeys(collapse, "with on_collapse=off; set on_collapse to stop or rollback")
    if "rollback" not in actions:
        idle["skip_window_steps"] = (
            "without a rollback; set on_non_finite, on_spike or on_collapse to rollback"
        )
        if "skip" not in actions:
            idle["max_interventions"] = (
                "where nothing is skipped or rolled back; set on_spike=skip for example"
            )
    return idle


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
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    guard: GuardConfig = GuardConfig()
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
        name, model = self.train.expert_backend, self.model
        if name == "auto":
            return self
        needs, widths = NEEDS[name], (model.d_model, model.d_expert)
        if any(width % needs.width_multiple for width in widths):
            raise ValueError(
                f"train.expert_backend={name} needs multiples of {needs.width_multiple}, not model.d_model="
                f"{model.d_model} and model.d_expert={model.d_expert}; change them, or use "
                "train.expert_backend=sorted_loop"
            )
        if needs.is_half_precision and self.train.precision == "fp32":
            raise ValueError(
                f"train.expert_backend={name} would multiply fp32 as TF32; use train.precision=bf16, or "
                "train.expert_backend=sorted_loop"
            )
        if self._overflows_int32(name):
            most = (MAX_PLACES - 1) // self._places_of_sequence(name)
            remedy = f"use at most {most}, or" if most else "use"
            seqs = self.train.microbatch_seqs
            raise ValueError(
                f"train.expert_backend={name} takes less than {MAX_PLACES:,} numbers of routed rows at once, "
                f"and train.microbatch_seqs={seqs} gives {seqs * self._places_of_sequence(name):,}; {remedy} "
                "train.expert_backend=torch_grouped"
            )
        return self

    def fits_int32(self, backend: str) -> bool:
        """Return whether an expert backend can count the numbers of its weights, and of a micro-batch's rows
        whatever the routing.
        """
        model = self.model
        n_weights = model.n_experts // self.parallel.ep * model.d_model * 2 * model.d_expert
        has_few_weights = not NEEDS[backend].has_32_bit_places or n_weights < MAX_PLACES
        return has_few_weights and not self._overflows_int32(backend)

    def _overflows_int32(self, backend: str) -> bool:
        n_places = self.train.microbatch_seqs * self._places_of_sequence(backend)
        return NEEDS[backend].has_32_bit_places and n_places >= MAX_PLACES

    def _places_of_sequence(self, backend: str) -> int:
        """Return the numbers of a sequence's rows on the rank that has most of them."""
        model, parallel = self.model, self.parallel
        width = max(model.d_model, 2 * model.d_expert) if backend == "triton_grouped" else model.d_model
        load: float = parallel.ep  # all rows of all ranks
        if parallel.ep > 1 and parallel.ep_max_load is not None:
            load = min(load, parallel.ep_max_load)
        return math.ceil(model.seq_len * model.top_k * width // parallel.tp * load)

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.sample.prompts and self.sample.n_tokens >= self.model.seq_len:
            raise ValueError(
                f"sample.n_tokens={self.sample.n_tokens} must be below model.seq_len={self.model.seq_len}; "
                f"use at most {self.model.seq_len - 1}"
            )
        return self

    @model_validator(mode="after")
    def _check_rollback(self) -> Self:
        guard, every_steps, n_steps = self.guard, self.checkpoint.every_steps, self.train.n_steps
        actions = {
            "guard.on_non_finite": guard.on_non_finite,
            "guard.on_spike": guard.on_spike,
            "guard.on_collapse": guard.on_collapse,
        }
        path = next((path for path, action in actions.items() if action == "rollback"), None)
        if path is not None and (every_steps is None or every_steps >= n_steps):
            given = "" if every_steps is None else f", not to checkpoint.every_steps={every_steps}"
            raise ValueError(
                f"{path}=rollback needs a checkpoint before the last step to go back to{given}; "
                f"set checkpoint.every_steps below train.n_steps={n_steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_guard_steps(self) -> Self:
        n_steps, window, patience = (
            self.train.n_steps,
            self.guard.spike_window_steps,
            self.guard.collapse_patience_steps,
        )
        if window is not None and window >= n_steps:
            raise ValueError(
                f"guard.spike_window_steps={window} must be below train.n_steps={n_steps}, or no spike is "
                f"ever found; use at most {n_steps - 1}, or guard.on_spike=off"
            )
        if patience is not None and patience > n_steps:
            raise ValueError(
                f"guard.collapse_patience_steps={patience} must not be above train.n_steps={n_steps}, or no "
                f"collapse is ever found; use at most {n_steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_collapse_limits(self) -> Self:
        """Refuse limits that no routing exceeds, or every one: a token's top_k experts are distinct."""
        n_experts, top_k = self.model.n_experts, self.model.top_k
        load, dead = self.guard.max_load_frac, self.guard.max_dead_frac
        if load is not None and not 1 / n_experts <= load < 1 / top_k:
            raise ValueError(
                f"guard.max_load_frac={load} must be at least {1 / n_experts:.4g} (1 / model.n_experts, even "
                f"routing) and below {1 / top_k:.4g} (1 / model.top_k, the most that one expert can get); "
                "use a value between, or guard.max_dead_frac"
            )
        most_dead = (n_experts - top_k) / n_experts
        if dead is not None and dead >= most_dead:
            raise ValueError(
                f"guard.max_dead_frac={dead} must be below {most_dead:.4g}, because model.top_k={top_k} of "
                f"model.n_experts={n_experts} always get rows; use a smaller value, or drop it"
            )
        return self
