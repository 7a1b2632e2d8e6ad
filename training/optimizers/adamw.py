"""AdamW and its parameter groups: weight decay applies to matrices, not to norms and biases."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from turnout.training.config.optim import OptimConfig

ParamGroups = list[dict[str, Any]]

# torch's optimizers import torch's compiler only to exclude their methods from compiled graphs. That delays
# the start of each rank by a second, and our optimizers are in no graph. These are private parts of torch,
# each with a test: if a release moves them, ranks start more slowly but compute the same.
METHODS_OUT_OF_GRAPHS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
CACHED = "__dynamo_disable"  # the attribute in which torch caches a function's uncompiled form


def plain_step(optimizer: type[Optimizer]) -> Callable[..., Any]:
    """Return the class's step under torch.no_grad, without torch's wrapper, which imports the compiler."""
    step = optimizer.step
    return torch.no_grad()(getattr(step, "__wrapped__", step))


def keep_compiler_out() -> None:
    """Let the methods of all optimizers run without importing the compiler. Idempotent."""
    for name in METHODS_OUT_OF_GRAPHS:
        plain = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, CACHED):
            setattr(plain, CACHED, plain)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter decays: matrices (also embeddings and experts), not norms and biases."""
    return parameter.ndim >= 2 and not name.endswith("norm.weight")


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> ParamGroups:
    """Split parameters into groups with and without weight decay. DeepSpeed requires named groups."""
    named = list(named_parameters)
    return [
        {"name": "decay", "params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]


# The state AdamW keeps for each element, and once for all elements.
ADAMW_KINDS, ADAMW_SCALARS = ("exp_avg", "exp_avg_sq"), ("step",)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, except that its step does not import torch's compiler."""

    step = plain_step(torch.optim.AdamW)


def build_adamw(groups: ParamGroups, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a run."""
    keep_compiler_out()
    return AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
