"""Rows copied and summed by the Triton kernels of megablocks (Gale et al. 2022, 2211.15841): `copy_rows` and
`sum_rows` of moe/experts/permute.py, for GPUs.

We use only its operators gather and scatter, not its layer dMoE, which routes by a softmax in the weights'
dtype, keeps balancing losses in a global list, and scales the gradients of experts by 1 / ep.

Shapes
  T tokens   D d_model   N routed rows = T * n_copies
"""

import importlib.util
import sys
import warnings
from functools import cache, partial
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from turnout.moe.experts.requirements import check_element_count

# The compiled module that `import megablocks` needs. gather and scatter call nothing of it.
COMPILED = "megablocks_ops"
COMPILED_OPERATORS = (
    "exclusive_cumsum",
    "histogram",
    "inclusive_cumsum",
    "indices",
    "replicate_backward",
    "replicate_forward",
    "sort",
)


def copy_rows(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
    """Return each row of x_TD n_copies times, reordered: row i of the result is x_TD[order_N[i] // n_copies].

    order_N is a permutation of N = T * n_copies.
    """
    _check(x_TD, order_N)
    rows_ND: Tensor = _operators().gather(x_TD.contiguous(), *_as_one_bin(order_N), n_copies)
    return rows_ND


def sum_rows(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
    """Return the sum of each token's rows, [T, D]: copy_rows backwards. Half precision is summed in fp32."""
    _check(rows_ND, order_N)
    indices_N, bin_ids_N, bins = _as_one_bin(order_N)
    no_weights = None  # the rows contain them already
    scatter = _operators().scatter
    x_TD: Tensor = scatter(rows_ND.contiguous(), indices_N, bin_ids_N, no_weights, bins, n_copies)
    return x_TD


def _as_one_bin(order_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return megablocks' indices [N], bin_ids [N] and bins [1], all int32.

    Bins say where experts end. That matters only if experts are padded, which ours are not, so one bin is
    enough.
    """
    indices_N = order_N.to(torch.int32)
    return indices_N, torch.zeros_like(indices_N), indices_N.new_full((1,), indices_N.numel())


def _check(rows: Tensor, order_N: Tensor) -> None:
    """Raise ValueError for rows that the kernels would compute wrongly, or refuse without a reason."""
    if rows.dtype == torch.float64:
        raise ValueError(
            "expert backend 'megablocks' computes in fp32 at most, but these rows are fp64; "
            "use backend 'reference' or 'sorted_loop'"
        )
    if rows.device.type != "cuda" and not _is_interpreted():
        raise ValueError(
            f"expert backend 'megablocks' runs Triton kernels, which need a GPU, but these rows are on "
            f"{rows.device}; use another backend there, or Triton's interpreter (TRITON_INTERPRET=1)"
        )
    check_element_count("megablocks", rows=(order_N.numel(), rows.size(1)))


def _is_interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton  # here because only torch for GPUs brings it

    return bool(triton.knobs.runtime.interpret)


@cache
def _operators() -> Any:
    """Import megablocks.ops, even if its CUDA operators are not compiled."""
    # CUDA 13 removed functions that its CUDA operators call, so they do not compile there, and `import
    # megablocks` fails without them. Only its layer calls them, so a stand-in that raises is enough.
    if COMPILED not in sys.modules and importlib.util.find_spec(COMPILED) is None:
        sys.modules[COMPILED] = _stand_in()
    with warnings.catch_warnings():
        # We use F.grouped_mm instead.
        warnings.filterwarnings("ignore", message="Grouped GEMM not available")
        # Imported here because it takes seconds, exists only for GPUs, and few runs use it.
        from megablocks import ops
    return ops


def _stand_in() -> ModuleType:
    module = ModuleType(COMPILED, "Stands in for megablocks' compiled operators.")
    for name in COMPILED_OPERATORS:
        setattr(module, name, partial(_refuse, name))
    return module


def _refuse(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"{COMPILED}.{name} was called, but megablocks was installed without its compiled operators; "
        "install it with CUDA 12 and CUDA_HOME set, or avoid megablocks' own layers"
    )
