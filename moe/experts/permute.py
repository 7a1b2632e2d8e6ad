"""Reordering rows, forward and backward, by gathers only.

Autograd's own backward of indexing is a scatter-add: slower on CPUs, and not repeatable on GPUs, where it
uses atomics. A permutation's backward is the inverse permutation, so it can gather instead.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def invert(order_N: Tensor) -> Tensor:
    """Return inverse_N with inverse_N[order_N[i]] = i."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_N), None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.n_copies = n_copies
        return x_TD.index_select(0, order_N // n_copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return _sum_gathered(grads[0], inverse_N, ctx.n_copies), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.n_copies = n_copies
        return _sum_gathered(rows_ND, inverse_N, n_copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order_N,) = ctx.saved_tensors
        return grads[0].index_select(0, order_N // ctx.n_copies), None, None, None


def _sum_gathered(rows_ND: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
    """Return each token's sum of its rows, [T, D], without a sorted copy of the rows."""
    return F.embedding_bag(inverse_N.view(-1, n_copies), rows_ND, mode="sum")


# torch gives Function.apply no types.
_permute: Callable[[Tensor, Tensor, Tensor], Tensor] = _Permute.apply
_copy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _Copy.apply
_sum: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _Sum.apply


def permute_rows(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Return rows_ND[order_N]; order_N is a permutation and inverse_N its inverse. Any trailing shape."""
    return _permute(rows_ND, order_N, inverse_N)


def copy_rows(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
    """Return each row of x_TD n_copies times, reordered: row i of the result is x_TD[order_N[i] // n_copies].

    order_N is a permutation of N = T * n_copies.
    """
    return _copy(x_TD, order_N, inverse_N, n_copies)


def sum_rows(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, n_copies: int) -> Tensor:
    """Return the sum of each token's rows, [T, D]: copy_rows backwards. Half precision is summed in fp32."""
    return _sum(rows_ND, order_N, inverse_N, n_copies)
