"""Private parts of torch that we use. A test fails for each one that a release of torch moves.

torch's optimizers import torch's compiler, in order to be left out of compiled graphs. That adds a second to
the start of each rank, and our optimizers are in no graph. If a release moves these parts, ranks start more
slowly and compute the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

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
