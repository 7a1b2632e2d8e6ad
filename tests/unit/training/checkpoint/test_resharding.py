"""Shards of a tensor, compared with index arithmetic that a reader can check by eye."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from turnout.moe.parallel.sharding import Split
from turnout.training.checkpoint.resharding import Matrix, Shard, overlaps, tiling_fault

SPLITS = {"whole": None, "rows": Split("tp", 0), "columns": Split("tp", 1), "experts": Split("ep", 0)}


def cut(shape: tuple[int, ...], split: Split | None, n_parts: int, n_ranks: int, seed: int) -> list[Shard]:
    """Cut a tensor into parts, and each part into uneven ranges, as ZeRO does."""
    matrix = Matrix.of(shape, split)
    width, generator = matrix.row_width // n_parts, random.Random(seed)
    shards = []
    for part in range(n_parts):
        n = matrix.n_rows * width
        edges = sorted({0, n, *(generator.randrange(n) for _ in range(n_ranks - 1))})
        shards += [Shard(part * width, width, start, stop) for start, stop in pairwise(edges)]
    return shards


def take(whole: Tensor, matrix: Matrix, shard: Shard) -> Tensor:
    """Return a shard of a tensor: select the columns, flatten, select the range."""
    columns = whole.view(matrix.n_rows, matrix.row_width)[:, shard.first_col : shard.first_col + shard.width]
    return columns.flatten()[shard.start : shard.stop]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("shape", [(6, 12), (12, 6, 4), (12, 1)], ids=str)
def test_any_shards_fill_any_others_each_element_once(shape: tuple[int, ...], split: Split | None) -> None:
    if shape == (12, 1) and split is not None and split.dim == 1:
        shape = (1, 12)
    whole, matrix = torch.rand(shape), Matrix.of(shape, split)
    parts = [1] if split is None else [1, 2, 3]
    for seed, (n_from, n_to) in enumerate((a, b) for a in parts for b in parts):
        sources = cut(shape, split, n_from, 4, seed)
        for target in cut(shape, split, n_to, 3, seed + 100):
            out, n_written = torch.full((target.numel,), torch.nan), 0
            for source in sources:
                for overlap in overlaps(source, target):
                    begin, end = overlap.read
                    overlap.copy(take(whole, matrix, source)[begin:end], out)
                    n_written += overlap.numel
            assert torch.equal(out, take(whole, matrix, target)), (target, n_from, n_to)
            assert n_written == target.numel, "no element is copied twice"


def test_the_columns_of_a_matrix_begin_at_the_split_dimension() -> None:
    assert Matrix.of((3, 4, 5), None) == Matrix(1, 60)
    assert Matrix.of((3, 4, 5), Split("ep", 0)) == Matrix(1, 60)
    assert Matrix.of((3, 4, 5), Split("tp", 1)) == Matrix(3, 20)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_gaps_overlaps_and_excess_are_found_in_a_tiling(split: Split | None) -> None:
    shape = (6, 12)
    matrix, shards = Matrix.of(shape, split), cut(shape, split, 1 if split is None else 3, 3, seed=1)
    assert tiling_fault(matrix, shards) is None and tiling_fault(matrix, shards[::-1]) is None
    for i, shard in enumerate(shards):
        others = shards[:i] + shards[i + 1 :]
        shorter = Shard(shard.first_col, shard.width, shard.start, shard.stop - 1)
        longer = Shard(shard.first_col, shard.width, shard.start, shard.stop + 1)
        shifted = Shard(shard.first_col + 1, shard.width, shard.start, shard.stop)
        for wrong in ([], [shard, shard], [shorter], [longer], [shifted]):
            assert tiling_fault(matrix, others + wrong), (shard, wrong)
