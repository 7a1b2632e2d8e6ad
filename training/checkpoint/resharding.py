"""The shards of a tensor: their geometry, and copying from the saved shards into those of another layout.

Integers and copies; no files, no processes. A tensor split along `dim` is viewed as a matrix: `n_rows` is the
product of the sizes before dim, and `row_width` the product of the sizes from dim on. Every tensor-parallel
or expert-parallel part is then a block of whole columns. A shard is a range of the flattened block: the
elements in one rank's ZeRO partition.

    n_rows 3, row_width 8, two parts of 4 columns; elements 2 to 8 of the second part are
        . . . . | . . x x
        . . . . | x x x x
        . . . . | x . . .
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from turnout.moe.parallel.sharding import Split

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and not needed to read a manifest


@dataclass(frozen=True)
class Matrix:
    """A tensor viewed as a matrix in which each part is a block of whole columns."""

    n_rows: int
    row_width: int

    @classmethod
    def of(cls, shape: Sequence[int], split: Split | None) -> "Matrix":
        """Return the matrix of a whole tensor of this shape."""
        dim = 0 if split is None else split.dim
        return cls(prod(shape[:dim]), prod(shape[dim:]))


@dataclass(frozen=True, order=True)
class Shard:
    """Elements [start, stop) of the flattened block of columns [first_col, first_col + width)."""

    first_col: int
    width: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Rectangle:
    """Rows [top, bottom) of columns [left, right), stored row by row from `offset` of the shard on."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int

    @property
    def width(self) -> int:
        return self.right - self.left


def _rectangles(shard: Shard) -> Iterator[_Rectangle]:
    """Cut a shard into at most three rectangles: the end of a row, whole rows, the beginning of a row."""
    pos, left, width = shard.start, shard.first_col, shard.width
    while pos < shard.stop:
        row, col = divmod(pos, width)
        n_whole = (shard.stop - pos) // width if col == 0 else 0
        n_cols = width if n_whole else min(width - col, shard.stop - pos)
        n_rows = max(1, n_whole)
        yield _Rectangle(row, row + n_rows, left + col, left + col + n_cols, pos - shard.start)
        pos += n_rows * n_cols


@dataclass(frozen=True)
class Overlap:
    """The common elements of two shards, as one block of columns in a range of rows.

    read      the range of the source shard's elements that holds the common rows
    n_rows    number of rows; the source range is n_rows x source_width, the target's n_rows x target_width
    """

    read: tuple[int, int]
    n_rows: int
    source_width: int
    source_col: int
    target_start: int
    target_width: int
    target_col: int
    n_cols: int

    @property
    def numel(self) -> int:
        return self.n_rows * self.n_cols

    def copy(self, source: "Tensor", target: "Tensor") -> None:
        """Copy the common elements. source [read stop - start], target [target shard's numel]; both flat."""
        block = source.view(self.n_rows, self.source_width).narrow(1, self.source_col, self.n_cols)
        stop = self.target_start + self.n_rows * self.target_width
        rows = target[self.target_start : stop].view(self.n_rows, self.target_width)
        rows.narrow(1, self.target_col, self.n_cols).copy_(block)


def overlaps(source: Shard, target: Shard) -> Iterator[Overlap]:
    """Yield the blocks of elements that both shards hold; none if they do not overlap."""
    for theirs in _rectangles(source):
        for ours in _rectangles(target):
            top, bottom = max(theirs.top, ours.top), min(theirs.bottom, ours.bottom)
            left, right = max(theirs.left, ours.left), min(theirs.right, ours.right)
            if top >= bottom or left >= right:
                continue
            begin = theirs.offset + (top - theirs.top) * theirs.width
            yield Overlap(
                read=(begin, begin + (bottom - top) * theirs.width),
                n_rows=bottom - top,
                source_width=theirs.width,
                source_col=left - theirs.left,
                target_start=ours.offset + (top - ours.top) * ours.width,
                target_width=ours.width,
                target_col=left - ours.left,
                n_cols=right - left,
            )


def tiling_fault(matrix: Matrix, shards: Sequence[Shard]) -> str | None:
    """Return where the shards fail to cover every element exactly once; None if they do."""
    blocks: dict[tuple[int, int], list[Shard]] = {}
    for shard in sorted(shards):
        blocks.setdefault((shard.first_col, shard.width), []).append(shard)
    next_col = 0
    for (first_col, width), ranges in blocks.items():
        if first_col != next_col or width < 1:
            return f"columns {next_col} to {first_col} are held by no rank, or by two"
        next_col += width
        starts = [*(shard.start for shard in ranges), matrix.n_rows * width]
        stops = [0, *(shard.stop for shard in ranges)]
        if starts != stops or any(shard.numel < 1 for shard in ranges):
            return f"elements of columns {first_col} to {next_col} are held by no rank, or by two"
    return None if next_col == matrix.row_width else f"columns from {next_col} on are held by no rank"
