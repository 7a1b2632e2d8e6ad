"""The experts one after the other, each writing into its slice of the results: fast on a CPU, right anywhere.

Contract: two operators that torch.compile and FakeTensor see as opaque, with shapes that follow from those of
the inputs, so that another routing is the same graph. Any dtype; one device sync in each.

What autograd would do and this does not: copy rows into pieces and back, keep silu(gate) and its product with
up for the backward pass, and fill a gradient of all experts for each of them.

Shapes
  R rows on this rank   D d_model   F d_expert   J 2 * d_expert: gate, then up   L experts on this rank
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.activation import Activation, compiled_swiglu, plain_swiglu

# Rows whose activations are computed in one call: those of several small experts, or a part of a large one's.
ROWS_AT_ONCE = 2048


def sorted_loop_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply each expert to its own rows. Each result is times its row's weight."""
    return _forward(rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF, False)[0]


def compiled_loop_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Do the same with activations that torch.compile fuses: at first that takes seconds, and a compiler."""
    return _forward(rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF, True)[0]


@torch.library.custom_op("turnout::sorted_loop", mutates_args=())
def _forward(
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_L: Tensor,
    gate_up_LDJ: Tensor,
    down_LDF: Tensor,
    compiles: bool,
) -> tuple[Tensor, Tensor]:
    """Return the results [R, D], and the products with gate and up [R, J] for the backward pass."""
    activation = _activation(compiles)
    out_RD = torch.empty_like(rows_RD)
    products_RJ = rows_RD.new_empty(rows_RD.size(0), gate_up_LDJ.size(2))
    for turn in _turns(counts_L.tolist()):
        for expert, here in turn.parts:
            torch.mm(rows_RD[here], gate_up_LDJ[expert], out=products_RJ[here])
        hidden = activation.forward(products_RJ[turn.whole], weights_R[turn.whole])
        for expert, here in turn.parts:
            torch.mm(hidden[turn.within(here)], down_LDF[expert].t(), out=out_RD[here])
    return out_RD, products_RJ


@torch.library.custom_op("turnout::sorted_loop_backward", mutates_args=())
def _backward(
    grad_RD: Tensor,
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_L: Tensor,
    products_RJ: Tensor,
    gate_up_LDJ: Tensor,
    down_LDF: Tensor,
    compiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of rows, weights, gate_up and down. Experts without rows have zeros."""
    activation = _activation(compiles)
    d_rows_RD, d_weights_R = torch.empty_like(rows_RD), torch.empty_like(weights_R)
    d_gate_up_LDJ, d_down_LDF = torch.empty_like(gate_up_LDJ), torch.empty_like(down_LDF)
    counts, last = counts_L.tolist(), None
    for turn in _turns(counts):
        d_hidden = rows_RD.new_empty(turn.n_rows, down_LDF.size(2))
        for expert, here in turn.parts:
            torch.mm(grad_RD[here], down_LDF[expert], out=d_hidden[turn.within(here)])
        hidden, d_products, d_weights_R[turn.whole] = activation.backward(
            d_hidden, products_RJ[turn.whole], weights_R[turn.whole]
        )
        for expert, here in turn.parts:
            there, is_first = turn.within(here), expert != last
            torch.mm(d_products[there], gate_up_LDJ[expert].t(), out=d_rows_RD[here])
            _multiply(_turned(grad_RD[here]), hidden[there], d_down_LDF[expert], is_first=is_first)
            _multiply(_turned(rows_RD[here]), d_products[there], d_gate_up_LDJ[expert], is_first=is_first)
            last = expert
    for expert, n_rows in enumerate(counts):
        if not n_rows:
            d_gate_up_LDJ[expert].zero_()
            d_down_LDF[expert].zero_()
    return d_rows_RD, d_weights_R, d_gate_up_LDJ, d_down_LDF


def _activation(compiles: bool) -> Activation:
    return compiled_swiglu() if compiles else plain_swiglu


def _turned(rows: Tensor) -> Tensor:
    """Return the transpose, in half precision a copy of it: oneDNN is slow with columns that lie apart."""
    return rows.t().contiguous() if rows.dtype.itemsize == 2 else rows.t()


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, is_first: bool) -> None:
    """Write a product, or where it is not the first, add it."""
    if is_first:
        torch.mm(left, right, out=out)
    else:
        out.addmm_(left, right)


@dataclass(frozen=True)
class _Turn:
    """Rows that are neighbours: of whom each part is."""

    whole: slice
    parts: list[tuple[int, slice]]

    @property
    def n_rows(self) -> int:
        return self.whole.stop - self.whole.start

    def within(self, part: slice) -> slice:
        return slice(part.start - self.whole.start, part.stop - self.whole.start)


def _turns(counts: list[int]) -> Iterator[_Turn]:
    """Cut all rows into turns of ROWS_AT_ONCE, the last of what is left."""
    start, first, parts = 0, 0, list[tuple[int, slice]]()
    for expert, n_rows in enumerate(counts):
        stop = start + n_rows
        while start < stop:
            end = min(stop, first + ROWS_AT_ONCE)
            parts.append((expert, slice(start, end)))
            start = end
            if start == first + ROWS_AT_ONCE:
                yield _Turn(slice(first, start), parts)
                first, parts = start, []
    if parts:
        yield _Turn(slice(first, start), parts)


@_forward.register_fake
def _(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(rows_RD), rows_RD.new_empty(rows_RD.size(0), gate_up_LDJ.size(2))


@_backward.register_fake
def _(grad_RD: Tensor, rows_RD: Tensor, weights_R: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, gate_up_LDJ, down_LDF, _ = others
    return tuple(torch.empty_like(like) for like in (rows_RD, weights_R, gate_up_LDJ, down_LDF))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF, ctx.compiles = inputs
    _, products_RJ = output
    ctx.save_for_backward(rows_RD, weights_R, counts_L, products_RJ, gate_up_LDJ, down_LDF)
    ctx.set_materialize_grads(False)  # zeros for the products, which nobody uses further


def _differentiate(ctx: Any, grad_RD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_RD is None:  # of the results; opcheck asks for each output's alone
        return (None,) * 6
    d_rows_RD, d_weights_R, d_gate_up_LDJ, d_down_LDF = _backward(
        grad_RD.contiguous(), *ctx.saved_tensors, ctx.compiles
    )
    return d_rows_RD, d_weights_R, None, d_gate_up_LDJ, d_down_LDF, None


_forward.register_autograd(_differentiate, setup_context=_keep)
