"""DeepSpeed, and everything private to it. No other file of training/ knows that it is there.

Contract: a step applies exactly the gradient of the sum of the losses given to `backward` on all ranks,
clipped by its global norm. DeepSpeed averages over the data-parallel ranks, so `backward` multiplies by their
number.

Every DeepSpeed setting that bears on the result is written out here: the defaults have moved between releases
(gradient_clipping was 0 and is 1.0) and unknown top-level keys are ignored in silence.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from training.config import TrainConfig
from training.optimizer import ParamGroups
from training.parallel import Groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# DeepSpeed wants a number; the loop logs by itself, so this one is never reached.
NEVER = 10**9


@dataclass(frozen=True)
class StepOutcome:
    """grad_norm: the global norm before clipping, inf or nan where it is not finite.

    was_applied: False where a non-finite gradient made DeepSpeed skip the update; no weight has changed then.
    """

    grad_norm: float
    was_applied: bool


def deepspeed_config(cfg: TrainConfig, *, zero_stage: int, dp: int, n_microbatches: int) -> dict[str, Any]:
    """Return every DeepSpeed setting of a run. Pure; the reasons are in the comments."""
    return {
        "train_micro_batch_size_per_gpu": cfg.microbatch_seqs,
        "gradient_accumulation_steps": n_microbatches,
        "train_batch_size": cfg.microbatch_seqs * n_microbatches * dp,
        "gradient_clipping": cfg.clip_norm or 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Without these two, bf16 gradients are accumulated and reduced in bf16, with 12 times the error.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,  # False with stage 1 gives wrong expert gradients
            "round_robin_gradients": False,  # True breaks the map from parameter to fp32 master
            "reduce_scatter": True,
            "overlap_comm": False,
            "use_multi_rank_bucket_allreduce": True,
            "reduce_bucket_size": 2**27,
            "allgather_partitions": True,
            "allgather_bucket_size": 2**27,
            "compute_grad_norm": True,
            "elastic_checkpoint": False,
            "ignore_unused_parameters": False,
        },
        "bf16": {
            "enabled": cfg.precision == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": cfg.precision == "fp16",
            "auto_cast": False,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            "fp16_master_weights_and_grads": False,
        },
        "torch_autocast": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


class Engine:
    """One model under DeepSpeed: forward, backward, step, and the fp32 master weights by global name."""

    def __init__(
        self,
        module: nn.Module,
        cfg: TrainConfig,
        groups: Groups,
        *,
        zero_stage: int,
        n_microbatches: int,
        param_groups: ParamGroups,
        build_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
    ) -> None:
        _quieten()
        _skip_shm_build()
        if groups.device.type == "cpu":
            os.environ.setdefault("LOCAL_SIZE", str(groups.layout.world_size))
        deepspeed.init_distributed(verbose=False)  # joins the process group that is already there
        self.n_microbatches, self._groups = n_microbatches, groups
        settings = deepspeed_config(
            cfg, zero_stage=zero_stage, dp=groups.layout.dp, n_microbatches=n_microbatches
        )
        # Its bf16 optimizer prints memory reports that no setting turns off.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=build_optimizer(param_groups), config=settings
            )

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that keeps fp16 gradients representable; 1 otherwise."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def forward(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Accumulate this rank's share of the gradient: the sum over ranks is what a step applies."""
        self._engine.backward(loss * self._groups.layout.dp, scale_wrt_gas=False)
        if isinstance(self._engine.optimizer, BF16_Optimizer):
            # It has added the bf16 gradients to its fp32 sum and leaves them in place, so the next
            # micro-batch would add them again.
            self._engine.optimizer.clear_lp_grads()

    def finish_microbatch(self) -> None:
        """Tell DeepSpeed that one micro-batch, not the last of the step, is done."""
        self._engine.step()

    def step(self, lr: float) -> StepOutcome:
        """Clip and apply the gradients of n_microbatches backward passes. Decides the same on every rank."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return StepOutcome(float(self._engine.get_global_grad_norm()), self._engine.was_step_applied())

    def master_weights(self) -> dict[str, Tensor]:
        """Return the whole fp32 value of every parameter by name. Collective: every rank must call it."""
        masters = {}
        for name, parameter in self._engine.module.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            assert value is not None, f"DeepSpeed holds no fp32 master of {name}"
            masters[name] = value.detach().float().clone()
        return masters

    def close(self) -> None:
        self._engine.destroy()


def _quieten() -> None:
    """Leave DeepSpeed its errors: its banners, timings and advice repeat what the run directory holds."""
    deepspeed_logger.setLevel(logging.ERROR)


def _skip_shm_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory op on the CPU.

    It serves inference only, takes half a minute and a compiler, and a process killed while it compiles
    leaves a lock on which every later start waits for ever.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
