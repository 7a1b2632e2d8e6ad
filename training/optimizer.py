"""AdamW's parameter groups and the learning-rate schedules. Pure functions of step and config."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.config import OptimConfig, ScheduleConfig
from training.torch_internals import keep_compiler_out, plain_step

ParamGroups = list[dict[str, Any]]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices (embeddings and experts too), not to norms and
    biases.
    """
    return parameter.ndim >= 2 and not name.endswith("norm.weight")


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> ParamGroups:
    """Split parameters into a decayed and an undecayed group. DeepSpeed wants each group named."""
    named = list(named_parameters)
    return [
        {"name": "decay", "params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]


# What AdamW keeps of each element, and once for all of them.
ADAMW_KINDS, ADAMW_SCALARS = ("exp_avg", "exp_avg_sq"), ("step",)


class AdamW(torch.optim.AdamW):
    """torch's, whose step does not import torch's compiler."""

    step = plain_step(torch.optim.AdamW)


def build_adamw(groups: ParamGroups, cfg: OptimConfig) -> torch.optim.Optimizer:
    keep_compiler_out()
    return AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def lr_at(step: int, *, lr: float, schedule: ScheduleConfig, n_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Rises linearly to `lr` over warmup_steps, then falls to final_frac * lr at the last step: by a half cosine
    (Loshchilov and Hutter 2017, equation 5), by a line, or (wsd; Hu et al. 2024, section 4) by a line over
    the last decay_frac of all steps after a stable phase.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        assert schedule.decay_frac is not None, "checked by ScheduleConfig"
        start = max(start, n_steps - round(schedule.decay_frac * n_steps))
    if step < start:
        return lr
    done_frac = min(1.0, (step - start) / max(1, n_steps - 1 - start))
    falling = 0.5 * (1 + math.cos(math.pi * done_frac)) if schedule.kind == "cosine" else 1 - done_frac
    return lr * (schedule.final_frac + (1 - schedule.final_frac) * falling)
