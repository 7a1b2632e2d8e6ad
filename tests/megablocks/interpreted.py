"""Triton kernels on a CPU: stand-ins for a GPU, and for megablocks' compiled operators.

`make test-megablocks` sets TRITON_INTERPRET=1, so that Triton computes its kernels in numpy, block by block.
"""

import importlib
import importlib.util
import os
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.moe.experts import megablocks_rows

DEEPSPEED_KERNELS = "deepspeed.ops.triton_ops.group_gemm_triton"


def skip_elsewhere() -> None:
    """Skip the calling test module if it cannot run here."""
    if importlib.util.find_spec("megablocks") is None or os.environ.get("TRITON_INTERPRET") != "1":
        reason = "needs megablocks and Triton's interpreter; `make test-megablocks` has them"
        pytest.skip(reason, allow_module_level=True)


def pin_autotuners(module: ModuleType) -> None:
    """Leave each kernel only its first setting: trying all of them needs a GPU driver."""
    from triton.runtime.autotuner import Autotuner

    for kernel in vars(module).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = kernel.configs[:1]


@cache
def interpret_megablocks() -> None:
    """Make megablocks' kernels run here, unchanged: our backend imports them as on a GPU."""
    megablocks_rows._operators()
    pin_autotuners(importlib.import_module("megablocks.backend.kernels"))


@cache
def interpret_deepspeed() -> None:
    """Make DeepSpeed's grouped product run here: it defines its kernels only if Triton has a GPU."""
    load_deepspeed_kernels()
    pin_autotuners(sys.modules[DEEPSPEED_KERNELS])


def load_deepspeed_kernels() -> ModuleType:
    """Import the module of DeepSpeed's grouped product as on a GPU."""
    flag = importlib.import_module("deepspeed.ops.triton_ops._triton")
    flag.triton, flag.tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    flag._TRITON_AVAILABLE = True
    return importlib.reload(importlib.import_module(DEEPSPEED_KERNELS))


@cache
def complete_megablocks() -> None:
    """Replace all compiled operators of megablocks' own layers by torch, so that the layers run too."""
    interpret_megablocks()
    module = sys.modules["megablocks_ops"]
    for function in (exclusive_cumsum, inclusive_cumsum, histogram, sort, replicate_forward):
        setattr(module, function.__name__, function)
    grouped = importlib.import_module("megablocks.grouped_gemm_util")
    grouped._grouped_gemm_is_available = True
    grouped.ops = grouped.backend = SimpleNamespace(gmm=grouped_product)


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim))


def histogram(x: Tensor, n_bins: int) -> Tensor:
    return torch.bincount(x.flatten().long(), minlength=int(n_bins)).to(torch.int32)


def sort(x: Tensor, end_bit: int, values: Tensor, order: Tensor) -> None:
    found = x.sort(stable=True)
    values.copy_(found.values)
    order.copy_(found.indices)


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    sizes = torch.diff(bins, prepend=bins.new_zeros(1)).long()
    out.copy_(x.repeat_interleave(sizes, dim=1))


def grouped_product(a: Tensor, b: Tensor, batch_sizes: Tensor, *, trans_b: bool = False, **_: Any) -> Tensor:
    """Return a @ b of each group of rows, as grouped_gemm.ops.gmm does. Autograd does the gradients."""
    offsets = batch_sizes.cumsum(0).to(torch.int32)
    return F.grouped_mm(a, b.transpose(1, 2) if trans_b else b, offs=offsets)
