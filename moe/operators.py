"""Custom torch operators, which torch.compile and FakeTensor treat as opaque.

torch.library.custom_op does the same, but its first call imports torch's compiler, which takes a second.
"""

from collections.abc import Callable
from typing import Any

import torch


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
    return getattr(torch.ops.turnout, name).default
