"""Tensor parallelism: the collectives around matrices that are split over a group of ranks.

Shoeybi et al. 2019 (1909.08053, section 3) for the split of attention and feed-forward layers, Korthikanti et
al. 2022 (2205.05198, section 4.2) for sequence parallelism. Between the split layers every rank of the group
holds the same tokens, or, under sequence parallelism, 1 / size of them: consecutive rows.

Every rank of the group computes the same loss. So if all ranks hold a value and use it alike, each already
has its whole gradient. Gradients are summed only if each rank uses the value for a part of the work.

The docstrings of TensorParallel name Megatron's functions (megatron/core/tensor_parallel/mappings.py), where
`tp` is spelled `tensor_model_parallel_region` and `sp` `sequence_parallel_region`.

Shapes
  T tokens   T / size tokens of one rank   D d_model
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.moe.parallel.record import Record, no_record
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
        """Return the same object, but with this layer's index in its records."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Return the tokens [T, D] that a split layer computes, from those that a rank holds outside it:
        [T, D], or [T / size, D] under sequence parallelism.

        Megatron: copy_to_tp, or gather_from_sp under sequence parallelism.
        """
        ...

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial results [T, D] of a split layer over ranks, and return what a rank holds outside:
        [T, D], or [T / size, D] under sequence parallelism.

        Megatron: reduce_from_tp, or reduce_scatter_to_sp under sequence parallelism.
        """
        ...

    def own_tokens(self, x: Tensor) -> Tensor:
        """Return this rank's tokens [T / size, D] of those it holds outside the split layers: [T, D], or
        already [T / size, D] under sequence parallelism.

        Megatron: scatter_to_sp.
        """
        ...

    def join_tokens(self, x: Tensor) -> Tensor:
        """Undo own_tokens: from [T / size, D] to [T, D], or unchanged under sequence parallelism.

        Megatron: gather_from_sp with tensor_parallel_output_grad=False.
        """
        ...

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, [size * n, ...] of [n, ...]. All ranks must use them
        alike.

        Megatron: gather_from_sp with tensor_parallel_output_grad=False.
        """
        ...

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows, [n, ...] of [size * n, ...]. All ranks hold x, and it needs no gradient.

        Megatron: the forward pass of scatter_to_sp.
        """
        ...

    def shared(self, x: Tensor) -> Tensor:
        """Return x, a parameter of any shape that all ranks hold, for use on a part of the tokens or heads.

        Megatron: copy_to_tp.
        """
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over ranks, in the shape of x; all ranks must use it alike.

        Megatron: reduce_from_tp.
        """
        ...

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks, in the shape of x, without gradient.

        Megatron: the all-reduce in vocab_parallel_cross_entropy.
        """
        ...

    def gather_last(self, x: Tensor) -> Tensor:
        """Return the ranks' values side by side, [..., size * n] of [..., n], without gradient.

        Megatron: the forward pass of gather_from_tp.
        """
        ...


class Unsplit:
    """Every matrix is whole on this rank, so no value changes."""

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


# torch gives Function.apply no types.
_collective: Callable[[Tensor, Operation, Operation], Tensor] = _Collective.apply


# torch.compile must skip collectives: each is recorded by name, and another one runs in backward.
@uncompiled
def _communicate(x: Tensor, forward_op: Operation, backward_op: Operation) -> Tensor:
    return _collective(x, forward_op, backward_op)


@dataclass(frozen=True)
class SplitOverGroup:
    """Matrices are split over the ranks of a group. TensorParallel has the Megatron names of the methods."""

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
        """Copy [T, D], or all-gather it from [T / size, D]; backward all-reduces, or reduce-scatters."""
        if self.splits_tokens:
            return _communicate(x, self._all_gather, self._reduce_scatter)
        return _communicate(x, self._keep, self._all_reduce)

    def leave(self, x: Tensor) -> Tensor:
        """All-reduce [T, D], or reduce-scatter it to [T / size, D]; backward copies, or all-gathers."""
        if self.splits_tokens:
            return _communicate(x, self._reduce_scatter, self._all_gather)
        return _communicate(x, self._all_reduce, self._keep)

    def own_tokens(self, x: Tensor) -> Tensor:
        """Slice [T / size, D] out of [T, D]; backward all-gathers. Nothing under sequence parallelism."""
        return x if self.splits_tokens else _communicate(x, self.own_rows, self._all_gather)

    def join_tokens(self, x: Tensor) -> Tensor:
        """All-gather [T / size, D] to [T, D]; backward slices. Nothing under sequence parallelism."""
        return x if self.splits_tokens else self.gather_rows(x)

    def gather_rows(self, x: Tensor) -> Tensor:
        """All-gather [n, ...] to [size * n, ...]; backward slices."""
        return _communicate(x, self._all_gather, self.own_rows)

    def own_rows(self, x: Tensor) -> Tensor:
        """Slice [n, ...] out of [size * n, ...]; no gradient across ranks."""
        return x.chunk(self.size)[self.rank].contiguous()

    def shared(self, x: Tensor) -> Tensor:
        """Copy a tensor of any shape; backward all-reduces."""
        return _communicate(x, self._keep, self._all_reduce)

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce a tensor of any shape; backward copies."""
        return _communicate(x, self._all_reduce, self._keep)

    def max(self, x: Tensor) -> Tensor:
        """All-reduce a tensor of any shape by maximum; no gradient."""
        return self._all_reduce(x.detach(), dist.ReduceOp.MAX)

    def gather_last(self, x: Tensor) -> Tensor:
        """All-gather [..., n] to [..., size * n]; no gradient."""
        rows = self._all_gather(x.detach().movedim(-1, 0))
        return rows.movedim(0, -1)

    def _keep(self, x: Tensor) -> Tensor:
        return x.view_as(x)

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        # Sum into a copy: autograd may pass the same gradient tensor to several users.
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
