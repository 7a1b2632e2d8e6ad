"""The experts one after the other, each writing into its slice of the results: fast on a CPU, right anywhere.

Contract: two operators that torch.compile and FakeTensor see as opaque, with shapes that follow from those of
the inputs, so that another routing is the same graph. Any dtype; one device sync in each.

What autograd would do and this does not: copy rows into pieces and back, keep silu(gate) and its product with
up for the backward pass, and fill a gradient of all experts for each of them.

Shapes
  R rows on this rank   D d_model   F d_expert   L experts on this rank
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe.activation import swiglu_backward, weighted_swiglu

# Rows whose activations are in memory at once in the backward pass; an expert with more of them has several
# turns.
ROWS_AT_ONCE = 4096


def sorted_loop_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_LFD: Tensor, up_LFD: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply each expert to its own rows. Each result is times its row's weight."""
    return _forward(rows_RD, weights_R, counts_L, gate_LFD, up_LFD, down_LDF)[0]


@torch.library.custom_op("turnout::sorted_loop", mutates_args=())
def _forward(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_LFD: Tensor, up_LFD: Tensor, down_LDF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results [R, D], and the products with gate and up [R, F] for the backward pass."""
    n_rows, d_expert = rows_RD.size(0), gate_LFD.size(1)
    out_RD = torch.empty_like(rows_RD)
    gates_RF, ups_RF = rows_RD.new_empty(n_rows, d_expert), rows_RD.new_empty(n_rows, d_expert)
    for expert, here in _turns(counts_L):
        torch.mm(rows_RD[here], gate_LFD[expert].t(), out=gates_RF[here])
        torch.mm(rows_RD[here], up_LFD[expert].t(), out=ups_RF[here])
        hidden = weighted_swiglu(gates_RF[here], ups_RF[here], weights_R[here])
        torch.mm(hidden, down_LDF[expert].t(), out=out_RD[here])
    return out_RD, gates_RF, ups_RF


@torch.library.custom_op("turnout::sorted_loop_backward", mutates_args=())
def _backward(
    grad_RD: Tensor,
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_L: Tensor,
    gates_RF: Tensor,
    ups_RF: Tensor,
    gate_LFD: Tensor,
    up_LFD: Tensor,
    down_LDF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of rows, weights, gate, up and down. Experts without rows have zeros."""
    d_rows_RD, d_weights_R = torch.empty_like(rows_RD), torch.empty_like(weights_R)
    d_gate_LFD, d_up_LFD, d_down_LDF = (torch.empty_like(w) for w in (gate_LFD, up_LFD, down_LDF))
    last = None
    for expert, here in _turns(counts_L):
        grads, rows = grad_RD[here], rows_RD[here]
        d_hidden = torch.mm(grads, down_LDF[expert])
        hidden, d_gates, d_ups, d_weights_R[here] = swiglu_backward(
            d_hidden, gates_RF[here], ups_RF[here], weights_R[here]
        )
        for out, left, right in (
            (d_down_LDF[expert], grads, hidden),
            (d_gate_LFD[expert], d_gates, rows),
            (d_up_LFD[expert], d_ups, rows),
        ):
            if expert == last:
                out.addmm_(left.t(), right)
            else:
                torch.mm(left.t(), right, out=out)
        torch.mm(d_gates, gate_LFD[expert], out=d_rows_RD[here])
        d_rows_RD[here].addmm_(d_ups, up_LFD[expert])
        last = expert
    for expert, n_rows in enumerate(counts_L.tolist()):
        if not n_rows:
            for grad in (d_gate_LFD, d_up_LFD, d_down_LDF):
                grad[expert].zero_()
    return d_rows_RD, d_weights_R, d_gate_LFD, d_up_LFD, d_down_LDF


def _turns(counts_L: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows with where they are, ROWS_AT_ONCE at a time."""
    start = 0
    for expert, n_rows in enumerate(counts_L.tolist()):
        stop = start + n_rows
        for first in range(start, stop, ROWS_AT_ONCE):
            yield expert, slice(first, min(first + ROWS_AT_ONCE, stop))
        start = stop


@_forward.register_fake
def _(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_LFD: Tensor, up_LFD: Tensor, down_LDF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inner = rows_RD.size(0), gate_LFD.size(1)
    return torch.empty_like(rows_RD), rows_RD.new_empty(inner), rows_RD.new_empty(inner)


@_backward.register_fake
def _(
    grad_RD: Tensor,
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_L: Tensor,
    gates_RF: Tensor,
    ups_RF: Tensor,
    gate_LFD: Tensor,
    up_LFD: Tensor,
    down_LDF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(rows_RD), like(weights_R), like(gate_LFD), like(up_LFD), like(down_LDF)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    rows_RD, weights_R, counts_L, gate_LFD, up_LFD, down_LDF = inputs
    _, gates_RF, ups_RF = output
    ctx.save_for_backward(rows_RD, weights_R, counts_L, gates_RF, ups_RF, gate_LFD, up_LFD, down_LDF)
    ctx.set_materialize_grads(False)  # zeros for the products, which nobody uses further


def _differentiate(ctx: Any, grad_RD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_RD is None:
        return (None,) * 6
    d_rows_RD, d_weights_R, d_gate_LFD, d_up_LFD, d_down_LDF = _backward(
        grad_RD.contiguous(), *ctx.saved_tensors
    )
    return d_rows_RD, d_weights_R, None, d_gate_LFD, d_up_LFD, d_down_LDF


_forward.register_autograd(_differentiate, setup_context=_keep)
