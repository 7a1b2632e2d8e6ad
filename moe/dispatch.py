"""Send routed rows to the ranks that own their experts, and bring the results back.

Contract: combine(dispatch(rows)) with identity experts returns the rows, and so does its gradient.
Nothing here knows about scores: a row's weight travels to its expert as any other number of the row does.

Shapes
  N routed rows on the sending side   R rows on the receiving side   E n_experts   L experts on this rank
  P ranks of the expert-parallel group
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe.permute import invert, permute_rows


class Record(Protocol):
    """Keep note of a collective while it runs, so that a hang has a name.

    sent, received: rows to and from each rank of the group, where they are known.
    """

    def __call__(
        self,
        operation: str,
        group: str,
        *,
        layer: int | None = None,
        sent: Sequence[int] = (),
        received: Sequence[int] = (),
    ) -> AbstractContextManager[None]: ...


def no_record(
    operation: str,
    group: str,
    *,
    layer: int | None = None,
    sent: Sequence[int] = (),
    received: Sequence[int] = (),
) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Route:
    """How the rows of one layer travel.

    n_rows       N, rows on this rank before any drop
    counts_L     [L] int64 rows of each local expert, sum R
    sent         rows to each rank of the group; they sum to N less the dropped rows
    received     rows from each rank, sum R
    order_R, inverse_R  [R] received rows (by sender) to rows by local expert; None: they are in order
    """

    n_rows: int
    counts_L: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    order_R: Tensor | None = None
    inverse_R: Tensor | None = None


class Dispatcher(Protocol):
    def n_local_experts(self, n_experts: int) -> int:
        """Return how many experts live on this rank."""
        ...

    def at_layer(self, layer: int) -> Self:
        """Return a dispatcher that names this layer in its records."""
        ...

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        """Agree with the other ranks on who sends how much; at most one device sync.

        counts_E [E] int64 rows of each expert on this rank; n_rows may be more, where rows are dropped.
        """
        ...

    def dispatch(self, rows_ND: Tensor, route: Route) -> Tensor:
        """Move each row to its expert's rank: [N, ...] sorted by expert id, dropped rows last, to
        [R, ...] sorted by local expert. R differs per rank and per step; zero is legal.
        """
        ...

    def combine(self, rows_RD: Tensor, route: Route) -> Tensor:
        """Bring rows [R, d_model] back to where they were sent from, [N, d_model]; zeros for dropped rows."""
        ...


class LocalDispatcher:
    """Every expert is on this rank: rows stay where they are."""

    def n_local_experts(self, n_experts: int) -> int:
        return n_experts

    def at_layer(self, layer: int) -> Self:
        return self

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        n_kept = n_rows if is_dropless else int(counts_E.sum())
        return Route(n_rows, counts_E, (n_kept,), (n_kept,))

    def dispatch(self, rows_ND: Tensor, route: Route) -> Tensor:
        return rows_ND[: route.sent[0]]

    def combine(self, rows_RD: Tensor, route: Route) -> Tensor:
        return _pad(rows_RD, route.n_rows)


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Experts are spread over a group: rank p of P holds experts p * L to (p + 1) * L - 1."""

    group: dist.ProcessGroup
    record: Record = no_record
    layer: int | None = None

    def n_local_experts(self, n_experts: int) -> int:
        return n_experts // self.group.size()

    def at_layer(self, layer: int) -> Self:
        return replace(self, layer=layer)

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        sent_PL = counts_E.view(self.group.size(), -1)
        received_PL = torch.empty_like(sent_PL)
        with self.record("all-to-all of counts", "ep", layer=self.layer):
            dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=self.group)
        # The splits must be Python ints, so this is the layer's only device sync. Do not add another.
        sent, received = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
        n_local, n_received = sent_PL.size(1), sum(received)
        expert_R = torch.arange(n_local, device=counts_E.device).repeat(self.group.size())
        expert_R = expert_R.repeat_interleave(received_PL.flatten(), output_size=n_received)
        order_R = expert_R.sort(stable=True).indices
        return Route(n_rows, received_PL.sum(0), tuple(sent), tuple(received), order_R, invert(order_R))

    def dispatch(self, rows_ND: Tensor, route: Route) -> Tensor:
        assert route.order_R is not None and route.inverse_R is not None
        rows_RD = self._exchange(rows_ND[: sum(route.sent)], route.sent, route.received)
        return permute_rows(rows_RD, route.order_R, route.inverse_R)

    def combine(self, rows_RD: Tensor, route: Route) -> Tensor:
        assert route.order_R is not None and route.inverse_R is not None
        rows_RD = permute_rows(rows_RD, route.inverse_R, route.order_R)
        return _pad(self._exchange(rows_RD, route.received, route.sent), route.n_rows)

    def _exchange(self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        return _AllToAll.apply(rows, sent, received, self)

    def exchange_rows(self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        """Send the first sent[0] rows to rank 0, and so on, and return what came, by sender. No gradient."""
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        with self.record("all-to-all of rows", "ep", layer=self.layer, sent=sent, received=received):
            dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=self.group)
        return arrived


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        dispatcher: AllToAllDispatcher,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.dispatcher = sent, received, dispatcher
        return dispatcher.exchange_rows(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.dispatcher.exchange_rows(grads[0], ctx.received, ctx.sent), None, None, None


def _pad(rows: Tensor, n_rows: int) -> Tensor:
    return rows if rows.size(0) == n_rows else F.pad(rows, (0, 0, 0, n_rows - rows.size(0)))
