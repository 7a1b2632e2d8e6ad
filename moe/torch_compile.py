"""Functions that torch.compile must skip, because they depend on the routing, the packing or other ranks.

torch.compiler.disable imports torch's compiler, which adds a second to every start. So the decorators here
only register a function, and torch's decorator is applied when a model is compiled.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_named: list[tuple[Callable[..., Any], bool]] = []


def uncompiled(function: F) -> F:
    """Have torch.compile skip this function and everything it calls.

    The function is replaced in its module or class, so other modules must not import it by name.
    """
    _named.append((function, True))
    return function


def uncompiled_itself(function: F) -> F:
    """Have torch.compile skip this function, and compile what it calls."""
    _named.append((function, False))
    return function


def apply_uncompiled() -> None:
    """Apply torch.compiler.disable to every registered function. Call it before compiling a model."""
    while _named:
        function, is_recursive = _named.pop()
        owner: Any = sys.modules[function.__module__]
        *path, name = function.__qualname__.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, torch.compiler.disable(function, recursive=is_recursive))


def define_operator(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], *, on_cpu: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Define the operator turnout::NAME and return it. It must not change its arguments.

    run: the implementation for any device; the schema is inferred from its annotations
    fake: the shapes and dtypes of the result, for tensors without memory
    on_cpu: another implementation for CPUs
    """
    qualified = f"turnout::{name}"
    schema = torch.library.infer_schema(run, mutates_args=())
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", run)
    if on_cpu is not None:
        torch.library.impl(qualified, "cpu", on_cpu)
    torch.library.register_fake(qualified, fake)
    operator: Callable[..., Any] = getattr(torch.ops.turnout, name).default
    return operator
