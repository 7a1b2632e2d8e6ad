"""Splitting matrices over a tensor-parallel group: what is gathered, summed and split on the way.

Shoeybi et al. 2019 (1909.08053, section 3) for the split of attention and feed-forward layers, Korthikanti et
al. 2022 (2205.05198, section 4.2) for sequence parallelism. Between the split layers every rank of the group
holds the same tokens, or, under sequence parallelism, 1 / size of them: consecutive rows.

Every rank of the group computes the same loss, so the gradient of a value that all ranks hold alike is the
same on each of them; only where a value is used in part are gradients summed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.moe.parallel.expert_parallel import Record, no_record
from turnout.moe.torch_compile import uncompiled


class TensorParallel(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def splits_tokens(self) -> bool:
        """Sequence parallelism: outside the split layers a rank holds 1 / size of the tokens."""
        ...

    def at_layer(self, layer: int) -> Self:
        """Return the same, naming this layer in its records."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Return the tokens [T, D] that a split layer works on, from what a rank holds outside it."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial results [T, D] of a split layer into what a rank holds outside it."""
        ...

    def own_tokens(self, x: Tensor) -> Tensor:
        """Return this rank's tokens [T / size, D] of what it holds outside the split layers."""
        ...

    def join_tokens(self, x: Tensor) -> Tensor:
        """Undo own_tokens."""
        ...

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, in rank order, for a use that is the same on every rank."""
        ...

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of a value without gradient that every rank holds."""
        ...

    def shared(self, x: Tensor) -> Tensor:
        """Return a parameter that all ranks hold alike, for use on a part of the tokens or heads."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum the ranks' partial values for a use that is the same on every rank."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks, without gradient."""
        ...

    def gather_last(self, x: Tensor) -> Tensor:
        """Return the ranks' values side by side along the last dim, without gradient."""
        ...


class Unsplit:
    """One rank holds every matrix whole."""

    size, rank, splits_tokens = 1, 0, False

    def at_layer(self, layer: int) -> Self:
        return self

    def _same(self, x: Tensor) -> Tensor:
        return x

    enter = leave = own_tokens = join_tokens = gather_rows = own_rows = shared = sum = max = gather_last = (
        _same
    )


Operation = Callable[[Tensor], Tensor]


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_op: Operation, backward_op: Operation) -> Tensor:
        ctx.backward_op = backward_op
        return forward_op(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_op(grads[0]), None, None


# A collective is not for torch.compile: it is recorded by name, and backward has another.
@uncompiled
def _communicate(x: Tensor, forward_op: Operation, backward_op: Operation) -> Tensor:
    return _Collective.apply(x, forward_op, backward_op)


@dataclass(frozen=True)
class SplitOverGroup:
    """Matrices are split over the ranks of a group."""

    group: dist.ProcessGroup
    splits_tokens: bool = False
    record: Record = no_record
    layer: int | None = None

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def at_layer(self, layer: int) -> Self:
        return replace(self, layer=layer)

    def enter(self, x: Tensor) -> Tensor:
        if self.splits_tokens:
            return _communicate(x, self._all_gather, self._reduce_scatter)
        return _communicate(x, self._keep, self._all_reduce)

    def leave(self, x: Tensor) -> Tensor:
        if self.splits_tokens:
            return _communicate(x, self._reduce_scatter, self._all_gather)
        return _communicate(x, self._all_reduce, self._keep)

    def own_tokens(self, x: Tensor) -> Tensor:
        return x if self.splits_tokens else _communicate(x, self.own_rows, self._all_gather)

    def join_tokens(self, x: Tensor) -> Tensor:
        return x if self.splits_tokens else self.gather_rows(x)

    def gather_rows(self, x: Tensor) -> Tensor:
        return _communicate(x, self._all_gather, self.own_rows)

    def own_rows(self, x: Tensor) -> Tensor:
        return x.chunk(self.size)[self.rank].contiguous()

    def shared(self, x: Tensor) -> Tensor:
        return _communicate(x, self._keep, self._all_reduce)

    def sum(self, x: Tensor) -> Tensor:
        return _communicate(x, self._all_reduce, self._keep)

    def max(self, x: Tensor) -> Tensor:
        return self._all_reduce(x.detach(), dist.ReduceOp.MAX)

    def gather_last(self, x: Tensor) -> Tensor:
        rows = self._all_gather(x.detach().movedim(-1, 0))
        return rows.movedim(0, -1)

    def _keep(self, x: Tensor) -> Tensor:
        return x.view_as(x)

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        # A copy: autograd may hand the same gradient to several users.
        total = x.clone(memory_format=torch.contiguous_format)
        with self.record("all-reduce", "tp", layer=self.layer):
            dist.all_reduce(total, op, group=self.group)
        return total

    def _all_gather(self, x: Tensor) -> Tensor:
        rows = x.new_empty(x.size(0) * self.size, *x.shape[1:])
        with self.record("all-gather", "tp", layer=self.layer):
            dist.all_gather_into_tensor(rows, x.contiguous(), group=self.group)
        return rows

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        rows = x.new_empty(x.size(0) // self.size, *x.shape[1:])
        with self.record("reduce-scatter", "tp", layer=self.layer):
            dist.reduce_scatter_tensor(rows, x.contiguous(), group=self.group)
        return rows
