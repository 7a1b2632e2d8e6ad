"""The experts one after the other, each writing into its slice of the results: fast on a CPU, right anywhere.

Contract: two operators that are opaque to torch.compile and FakeTensor. Their output shapes follow from the
input shapes, so another routing is the same graph. Any dtype; one device sync in each.

It avoids three costs of autograd: copying rows to each expert and back, keeping silu(gate) and its product
with up for the backward pass, and filling a gradient of all experts for each expert.

Shapes
  R rows on this rank   D d_model   F d_expert   J 2 * d_expert: gate, then up   L experts on this rank
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.moe.experts.swiglu import Activation, compiled_swiglu, plain_swiglu
from turnout.moe.torch_compile import define_operator

# Rows whose activations are computed in one call: those of several small experts, or a part of a large one.
ROWS_AT_ONCE = 2048
# In half precision oneDNN generates a kernel for every number of rows, which takes several times as long as
# running it, and caches 1,024 of them. Each routing has other numbers, so they are rounded up, into the rows
# of the next expert: to whole AMX tiles, and from 512 rows on to a multiple of 1/32 to 1/16 of them.
TILE_ROWS = 16


def sorted_loop_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply each expert to its own rows, and multiply each result by its row's weight."""
    return _sorted_loop(rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF, False)[0]


def compiled_loop_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Do the same, with activations fused by torch.compile. The first call takes seconds and a compiler."""
    return _sorted_loop(rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF, True)[0]


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
    gate_ups, downs = gate_up_LDJ.unbind(), down_LDF.transpose(1, 2).unbind()
    for block in _blocks(counts_L.tolist(), rows_RD):
        for part in block.parts:
            _multiply(rows_RD, part.start, gate_ups[part.expert], products_RJ, part.start, part.n_rows)
        hidden = activation.forward(products_RJ[block.window], weights_R[block.window])
        for part in block.parts:
            _multiply(hidden, part.start - block.start, downs[part.expert], out_RD, part.start, part.n_rows)
    return out_RD, products_RJ


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
    """Return the gradients of rows, weights, gate_up and down; zeros for experts without rows."""
    activation = _activation(compiles)
    d_rows_RD, d_weights_R = torch.empty_like(rows_RD), torch.empty_like(weights_R)
    d_gate_up_LDJ, d_down_LDF = torch.empty_like(gate_up_LDJ), torch.empty_like(down_LDF)
    gate_ups, downs = gate_up_LDJ.transpose(1, 2).unbind(), down_LDF.unbind()
    d_gate_ups, d_downs = d_gate_up_LDJ.unbind(), d_down_LDF.unbind()
    counts, last = counts_L.tolist(), None
    for block in _blocks(counts, rows_RD):
        d_hidden = rows_RD.new_empty(block.n_window, down_LDF.size(2))
        for part in block.parts:
            _multiply(
                grad_RD, part.start, downs[part.expert], d_hidden, part.start - block.start, part.n_rows
            )
        hidden, d_products, d_weights = activation.backward(
            d_hidden, products_RJ[block.window], weights_R[block.window]
        )
        d_weights_R[block.start : block.start + block.n_rows] = d_weights[: block.n_rows]
        for part in block.parts:
            expert, there, n_rows = part.expert, part.start - block.start, part.n_rows
            _multiply(d_products, there, gate_ups[expert], d_rows_RD, part.start, n_rows)
            for left, right, out in ((grad_RD, hidden, d_downs), (rows_RD, d_products, d_gate_ups)):
                _multiply_transposed(
                    left, part.start, right, there, n_rows, out[expert], is_first=expert != last
                )
            last = expert
    for expert, n_rows in enumerate(counts):
        if not n_rows:
            d_gate_ups[expert].zero_()
            d_downs[expert].zero_()
    return d_rows_RD, d_weights_R, d_gate_up_LDJ, d_down_LDF


def _activation(compiles: bool) -> Activation:
    return compiled_swiglu() if compiles else plain_swiglu


def _multiply(left: Tensor, start: int, right: Tensor, out: Tensor, out_start: int, n_rows: int) -> None:
    """Write n_rows of left[start:] @ right to out[out_start:].

    It may overwrite rows of out that follow, so the caller must write those later.
    """
    n_rounded = _round_up(n_rows, left)
    if start + n_rounded <= left.size(0) and out_start + n_rounded <= out.size(0):
        here, there = slice(start, start + n_rounded), slice(out_start, out_start + n_rounded)
        torch.mm(left[here], right, out=out[there])
    else:
        products = _padded(left[start : start + n_rows], n_rounded) @ right
        out[out_start : out_start + n_rows] = products[:n_rows]


def _multiply_transposed(
    left: Tensor, start: int, right: Tensor, right_start: int, n_rows: int, out: Tensor, *, is_first: bool
) -> None:
    """Write left[start:].T @ right[right_start:], over n_rows rows, to out; add it if it is not the first.

    Rows that follow may be read and multiplied by 0: _multiply has written them. In fp16 they are not read,
    because they could be infinite.
    """
    n_rounded, is_finite = _round_up(n_rows, left), left.dtype != torch.float16
    if is_finite and start + n_rounded <= left.size(0) and right_start + n_rounded <= right.size(0):
        left, right = left[start : start + n_rounded], right[right_start : right_start + n_rounded]
    else:
        left = _padded(left[start : start + n_rows], n_rounded)
        right = _padded(right[right_start : right_start + n_rows], n_rounded)
    transposed = left.t()
    if left.dtype.itemsize == 2:
        # oneDNN is slow with strided columns.
        transposed = transposed.clone(memory_format=torch.contiguous_format)
    if n_rounded > n_rows:
        transposed[:, n_rows:] = 0
    if is_first:
        torch.mm(transposed, right, out=out)
    else:
        out.addmm_(transposed, right)


def _round_up(n_rows: int, rows: Tensor) -> int:
    """Return how many rows to compute instead of n_rows."""
    if rows.device.type != "cpu" or rows.dtype.itemsize != 2:
        return n_rows
    multiple = max(TILE_ROWS, 1 << n_rows.bit_length() >> 5)
    return -(-n_rows // multiple) * multiple


def _padded(rows: Tensor, n_rows: int) -> Tensor:
    return rows if len(rows) == n_rows else F.pad(rows, (0, 0, 0, n_rows - len(rows)))


@dataclass(frozen=True)
class _Part:
    """Rows of one expert."""

    expert: int
    start: int
    n_rows: int


@dataclass(frozen=True)
class _Block:
    """Consecutive rows whose activations are computed in one call.

    n_window: their number, with the following rows that rounding adds
    """

    parts: list[_Part]
    n_window: int

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def n_rows(self) -> int:
        return sum(part.n_rows for part in self.parts)

    @property
    def window(self) -> slice:
        return slice(self.start, self.start + self.n_window)


def _blocks(counts: list[int], rows: Tensor) -> Iterator[_Block]:
    """Cut all rows into blocks of at most ROWS_AT_ONCE: of whole experts, or a part of a larger one."""
    parts, n_rows, start = list[_Part](), 0, 0
    for expert, count in enumerate(counts):
        for first in range(0, count, ROWS_AT_ONCE):
            n_more = min(ROWS_AT_ONCE, count - first)
            if parts and n_rows + n_more > ROWS_AT_ONCE:
                yield _block(parts, rows)
                parts, n_rows = [], 0
            parts.append(_Part(expert, start, n_more))
            n_rows, start = n_rows + n_more, start + n_more
    if parts:
        yield _block(parts, rows)


def _block(parts: list[_Part], rows: Tensor) -> _Block:
    stop = max(part.start + _round_up(part.n_rows, rows) for part in parts)
    return _Block(parts, min(stop, rows.size(0)) - parts[0].start)


def _fake_forward(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(rows_RD), rows_RD.new_empty(rows_RD.size(0), gate_up_LDJ.size(2))


def _fake_backward(grad_RD: Tensor, rows_RD: Tensor, weights_R: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, gate_up_LDJ, down_LDF, _ = others
    return tuple(torch.empty_like(like) for like in (rows_RD, weights_R, gate_up_LDJ, down_LDF))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF, ctx.compiles = inputs
    _, products_RJ = output
    ctx.save_for_backward(rows_RD, weights_R, counts_L, products_RJ, gate_up_LDJ, down_LDF)
    ctx.set_materialize_grads(False)  # which would fill zeros for the products, which nothing else uses


def _differentiate(ctx: Any, grad_RD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_RD is None:  # torch.library.opcheck differentiates each output on its own
        return (None,) * 6
    d_rows_RD, d_weights_R, d_gate_up_LDJ, d_down_LDF = _sorted_loop_backward(
        grad_RD.contiguous(), *ctx.saved_tensors, ctx.compiles
    )
    return d_rows_RD, d_weights_R, None, d_gate_up_LDJ, d_down_LDF, None


_sorted_loop: Callable[..., tuple[Tensor, Tensor]] = define_operator("sorted_loop", _forward, _fake_forward)
_sorted_loop_backward = define_operator("sorted_loop_backward", _backward, _fake_backward)
torch.library.register_autograd("turnout::sorted_loop", _differentiate, setup_context=_keep)
