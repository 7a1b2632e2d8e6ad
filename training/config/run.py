"""The configuration tree: the only schema of a run. Its sections are the other files of this folder.

Here values are checked across sections. Checks that also need the number of ranks are in
training/parallel/layout.py, those that need the corpus in launch/preflight.py. launch/settings.py reads files
and `--set`.
"""

import math
from typing import Self

from pydantic import BaseModel, model_validator

from turnout.moe.config import STRICT, ModelConfig
from turnout.moe.experts.requirements import INT32_ELEMENTS, REQUIREMENTS
from turnout.training.config.checkpoint import CheckpointConfig
from turnout.training.config.data import DataConfig
from turnout.training.config.eval import EvalConfig
from turnout.training.config.guard import GuardConfig
from turnout.training.config.log import LogConfig
from turnout.training.config.optim import OptimConfig
from turnout.training.config.parallel import ParallelConfig
from turnout.training.config.sample import SampleConfig
from turnout.training.config.train import TrainConfig


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
        needs, widths = REQUIREMENTS[name], (model.d_model, model.d_expert)
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
            most = (INT32_ELEMENTS - 1) // self._elements_of_sequence(name)
            remedy = f"use at most {most}, or" if most else "use"
            seqs = self.train.microbatch_seqs
            raise ValueError(
                f"train.expert_backend={name} takes fewer than {INT32_ELEMENTS:,} elements of routed rows at "
                f"once, but train.microbatch_seqs={seqs} gives {seqs * self._elements_of_sequence(name):,}; "
                f"{remedy} train.expert_backend=torch_grouped"
            )
        return self

    def fits_int32(self, backend: str) -> bool:
        """Return whether an expert backend can index its weights, and any routing's rows of a micro-batch."""
        model = self.model
        n_weights = model.n_experts // self.parallel.ep * model.d_model * 2 * model.d_expert
        has_few_weights = not REQUIREMENTS[backend].indexes_int32 or n_weights < INT32_ELEMENTS
        return has_few_weights and not self._overflows_int32(backend)

    def _overflows_int32(self, backend: str) -> bool:
        n_elements = self.train.microbatch_seqs * self._elements_of_sequence(backend)
        return REQUIREMENTS[backend].indexes_int32 and n_elements >= INT32_ELEMENTS

    def _elements_of_sequence(self, backend: str) -> int:
        """Return the elements of a sequence's rows on the rank that holds the most."""
        model, parallel = self.model, self.parallel
        width = max(model.d_model, 2 * model.d_expert) if backend == "triton_grouped" else model.d_model
        load: float = parallel.ep  # of the mean: all rows of all ranks
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
            given = "" if every_steps is None else f", but checkpoint.every_steps={every_steps}"
            raise ValueError(
                f"{path}=rollback needs a checkpoint before the last step to return to{given}; "
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
                f"ever detected; use at most {n_steps - 1}, or guard.on_spike=off"
            )
        if patience is not None and patience > n_steps:
            raise ValueError(
                f"guard.collapse_patience_steps={patience} must not be above train.n_steps={n_steps}, or no "
                f"collapse is ever detected; use at most {n_steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_collapse_limits(self) -> Self:
        """Refuse limits that no routing or every routing exceeds: a token's top_k experts are distinct."""
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
