"""Rows copied and summed by megablocks' kernels, against moe/experts/permute.py, forward and backward."""

import importlib

import pytest
import torch
from torch import Tensor

from tests.megablocks.interpreted import interpret_megablocks, skip_elsewhere
from turnout.moe.experts import megablocks_rows, permute
from turnout.moe.experts.experts import MoveRows

skip_elsewhere()
triton = importlib.import_module("triton")
# The largest relative error of one rounding.
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = {  # tokens, copies of each, width
    "ragged": (37, 3, 24),
    "one copy": (11, 1, 8),
    "eight copies": (9, 8, 16),
    "wider than a block": (5, 2, 136),
    "one token": (1, 4, 8),
    "no tokens": (0, 3, 8),
}


@pytest.fixture(autouse=True)
def interpreted() -> None:
    interpret_megablocks()


def order_of(n_rows: int) -> Tensor:
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(n_rows))


def made_rows(n_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)


def move(way: MoveRows, rows: Tensor, slope: Tensor, n_copies: int) -> tuple[Tensor, Tensor]:
    """Return the moved rows, and the gradient of the rows if that of the result is slope."""
    leaf = rows.clone().requires_grad_()
    order = order_of(max(len(rows), len(slope)))
    out = way(leaf, order, permute.invert(order), n_copies)
    out.backward(slope)
    assert out.dtype == leaf.dtype == leaf.grad.dtype
    return out.detach(), leaf.grad


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("n_tokens", "n_copies", "width"), SHAPES.values(), ids=SHAPES.keys())
def test_rows_move_as_by_indexing(n_tokens: int, n_copies: int, width: int, dtype: torch.dtype) -> None:
    tokens, rows = made_rows(n_tokens, width, dtype), made_rows(n_tokens * n_copies, width, dtype)
    copies, summed_slope = move(megablocks_rows.copy_rows, tokens, rows, n_copies)
    sums, copied_slope = move(megablocks_rows.sum_rows, rows, tokens, n_copies)
    want_copies, want_summed_slope = move(permute.copy_rows, tokens, rows, n_copies)
    want_sums, want_copied_slope = move(permute.sum_rows, rows, tokens, n_copies)
    assert torch.equal(copies, want_copies) and torch.equal(copied_slope, want_copied_slope)
    # The sums in fp64. Both ways return them rounded once.
    order = order_of(n_tokens * n_copies)
    exact = rows[permute.invert(order)].double().view(n_tokens, n_copies, width).sum(1)
    for got, want in ((sums, want_sums), (summed_slope, want_summed_slope)):
        assert got.shape == want.shape
        if dtype == torch.float32 and n_copies <= 3:
            assert torch.equal(got, want)
        for found in (got, want):
            assert torch.all((found.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 1e-6)


def test_rows_of_every_other_column_are_moved_too() -> None:
    """The kernels need contiguous rows, so rows and gradients are made contiguous first."""
    order = order_of(15)
    inverse = permute.invert(order)
    tokens, rows = made_rows(5, 48, torch.float32)[:, ::2], made_rows(15, 48, torch.float32)[:, ::2]
    assert torch.equal(
        megablocks_rows.copy_rows(tokens, order, inverse, 3), permute.copy_rows(tokens, order, inverse, 3)
    )
    leaf = rows.clone().requires_grad_()
    sums = megablocks_rows.sum_rows(leaf, order, inverse, 3)
    sums.sum().backward()  # the gradient of sums is one expanded element
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    assert torch.equal(
        megablocks_rows.sum_rows(rows, order, inverse, 3), permute.sum_rows(rows, order, inverse, 3)
    )


@pytest.mark.parametrize("way", [megablocks_rows.copy_rows, megablocks_rows.sum_rows])
def test_rows_that_the_kernels_would_compute_wrongly_are_refused(
    way: MoveRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_of(4)
    with pytest.raises(ValueError, match="these rows are fp64; use backend 'reference' or 'sorted_loop'"):
        way(made_rows(4, 8, torch.float64), order, order, 1)
    huge = torch.empty(2**15, 2**16, device="meta")
    with pytest.raises(ValueError, match=r"rows would have 32768 x 65536; use fewer train\.microbatch_seqs"):
        way(huge, torch.empty(2**15, dtype=torch.int64, device="meta"), order, 1)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="need a GPU, but these rows are on cpu"):
        way(made_rows(4, 8, torch.float32), order, order, 1)


def test_a_compiled_operator_that_is_missing_raises_when_called() -> None:
    megablocks_ops = importlib.import_module("megablocks_ops")
    with pytest.raises(RuntimeError, match=r"megablocks_ops\.sort was called, .* install it with CUDA 12"):
        megablocks_ops.sort(order_of(4), 32, order_of(4), order_of(4))
