"""Send routed rows to the ranks that own their experts, and bring the results back.

Contract: combine(dispatch(rows)) with identity experts returns the rows, and so does its gradient.
Nothing here knows about scores: a row's weight travels to its expert as any other number of the row does.

Rows travel in trips, usually one. More of them keep a rank's memory within a limit where a routing sends it
too much, or let one trip's rows be computed while the next ones are on their way.

Shapes
  N routed rows that are sent   M of them in one trip   R rows that arrive in it   E n_experts
  L experts on this rank   P ranks of the expert-parallel group
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.moe.experts.permute import invert, permute_rows


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
class Chunk:
    """How rows travel at once.

    counts_L     [L] int64 rows of each local expert, sum R
    sent         rows to each rank of the group, sum M
    received     rows from each rank, sum R
    order_R, inverse_R  [R] received rows (by sender) to rows by local expert; None: they are in order
    """

    counts_L: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    order_R: Tensor | None = None
    inverse_R: Tensor | None = None

    @property
    def n_sent(self) -> int:
        return sum(self.sent)


@dataclass(frozen=True)
class Route:
    """How the rows of one layer travel: the same number of trips on every rank of the group.

    order_N        [N] rows sorted by expert to rows sorted by trip, then by expert; None: they are the same
    is_over_limit  some rank gets more rows than it is to hold: only one trip's activations may be kept
    n_extra        trips that are made for this limit alone
    """

    chunks: tuple[Chunk, ...]
    order_N: Tensor | None = None
    is_over_limit: bool = False
    n_extra: int = 0


@dataclass(frozen=True)
class Arrival:
    """Rows on their way. wait() returns them, and is called once."""

    wait: Callable[[], Tensor]


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

    def dispatch(self, rows: Tensor, chunk: Chunk) -> Arrival:
        """Move each row to its expert's rank: [M, ...] sorted by expert id to [R, ...] sorted by local
        expert. R differs per rank, trip and step; zero is legal.
        """
        ...

    def combine(self, rows: Tensor, chunk: Chunk) -> Arrival:
        """Bring rows [R, ...] back to where they were sent from, [M, ...]."""
        ...


class LocalDispatcher:
    """Every expert is on this rank: rows stay where they are."""

    def n_local_experts(self, n_experts: int) -> int:
        return n_experts

    def at_layer(self, layer: int) -> Self:
        return self

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        n_kept = n_rows if is_dropless else int(counts_E.sum())
        return Route((Chunk(counts_E, (n_kept,), (n_kept,)),))

    def dispatch(self, rows: Tensor, chunk: Chunk) -> Arrival:
        return Arrival(lambda: rows)

    def combine(self, rows: Tensor, chunk: Chunk) -> Arrival:
        return Arrival(lambda: rows)


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Experts are spread over a group: rank p of P holds experts p * L to (p + 1) * L - 1.

    max_load   rows that a rank takes in a trip, over the mean of the ranks; None: any number
    min_trips  trips of every layer, whatever its routing
    """

    group: dist.ProcessGroup
    record: Record = no_record
    layer: int | None = None
    max_load: float | None = None
    min_chunks: int = 1

    def n_local_experts(self, n_experts: int) -> int:
        return n_experts // self.group.size()

    def at_layer(self, layer: int) -> Self:
        return replace(self, layer=layer)

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        n_ranks, rank = self.group.size(), self.group.rank()
        gathered = counts_E.new_empty(n_ranks * counts_E.numel())
        with self.record("all-gather of counts", "ep", layer=self.layer):
            dist.all_gather_into_tensor(gathered, counts_E.contiguous(), group=self.group)
        counts_PPL = gathered.view(n_ranks, n_ranks, -1)  # sender, receiver, expert
        rows_PP = counts_PPL.sum(2)
        loads_P = rows_PP.sum(0)
        # The splits must be Python ints, so this is the layer's only device sync. Do not add another.
        numbers = torch.cat([rows_PP[rank], rows_PP[:, rank], loads_P.max()[None], loads_P.sum()[None]])
        *both, busiest, total = numbers.tolist()
        sent, received = both[:n_ranks], both[n_ranks:]
        n_needed = self._n_chunks(busiest, total / n_ranks)
        n_chunks = max(n_needed, self.min_chunks)
        chunks = tuple(self._chunk(counts_PPL[:, rank], sent, received, i, n_chunks) for i in range(n_chunks))
        order_N = _by_chunk(sent, n_chunks, n_rows).to(counts_E.device) if n_chunks > 1 else None
        return Route(chunks, order_N, is_over_limit=n_needed > 1, n_extra=n_chunks - self.min_chunks)

    def _n_chunks(self, busiest: int, mean: float) -> int:
        """Return the trips in which the busiest rank stays within the limit, but for a row of each sender."""
        if self.max_load is None or not busiest:
            return 1
        return min(busiest, math.ceil(busiest / (self.max_load * mean)))

    def _chunk(self, counts_PL: Tensor, sent: list[int], received: list[int], i: int, n_chunks: int) -> Chunk:
        """Return the trip in which part i of each sender's rows for each receiver goes."""
        stop_PL = counts_PL.cumsum(1)
        total_P1 = stop_PL[:, -1:]
        first_P1, last_P1 = total_P1 * i // n_chunks, total_P1 * (i + 1) // n_chunks
        part_PL = stop_PL.minimum(last_P1) - (stop_PL - counts_PL).maximum(first_P1)
        part_PL = part_PL.clamp(min=0)
        arriving = [_end(n, i, n_chunks) - _end(n, i - 1, n_chunks) for n in received]
        expert_R = torch.arange(part_PL.size(1), device=part_PL.device).repeat(part_PL.size(0))
        expert_R = expert_R.repeat_interleave(part_PL.flatten(), output_size=sum(arriving))
        order_R = expert_R.sort(stable=True).indices
        return Chunk(
            counts_L=part_PL.sum(0),
            sent=tuple(_end(n, i, n_chunks) - _end(n, i - 1, n_chunks) for n in sent),
            received=tuple(arriving),
            order_R=order_R,
            inverse_R=invert(order_R),
        )

    def dispatch(self, rows: Tensor, chunk: Chunk) -> Arrival:
        order_R, inverse_R = chunk.order_R, chunk.inverse_R
        assert order_R is not None and inverse_R is not None
        arrival = self._exchange(rows, chunk.sent, chunk.received)
        return Arrival(lambda: permute_rows(arrival.wait(), order_R, inverse_R))

    def combine(self, rows: Tensor, chunk: Chunk) -> Arrival:
        assert chunk.order_R is not None and chunk.inverse_R is not None
        rows = permute_rows(rows, chunk.inverse_R, chunk.order_R)
        return self._exchange(rows, chunk.received, chunk.sent)

    def send(
        self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> tuple["Underway", Tensor]:
        """Start to send the first sent[0] rows to rank 0, and so on; return where rows will be, by sender."""
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving, rows, list(received), list(sent), group=self.group, async_op=True
        )
        return work, arriving

    def _exchange(self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Arrival:
        journey = _Journey(self, sent, received)
        ticket = _Depart.apply(rows, journey)
        return Arrival(lambda: _Arrive.apply(ticket, journey))


class Underway(Protocol):
    """An exchange that has started."""

    def wait(self) -> object: ...


class _Journey:
    """One exchange of rows there, and of their gradients back."""

    def __init__(
        self, dispatcher: AllToAllDispatcher, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> None:
        self.dispatcher, self.sent, self.received = dispatcher, sent, received
        self._underway: tuple[Underway, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, is_back: bool) -> None:
        rows = rows.contiguous()
        work, arriving = self.dispatcher.send(rows, *self._splits(is_back=is_back))
        self._underway = work, arriving, rows  # which must be kept until they have been sent

    def finish(self, *, is_back: bool) -> Tensor:
        """Return the rows that have arrived."""
        sent, received = self._splits(is_back=is_back)
        assert self._underway is not None
        work, arriving, _ = self._underway
        layer = self.dispatcher.layer
        with self.dispatcher.record("all-to-all of rows", "ep", layer=layer, sent=sent, received=received):
            work.wait()
        self._underway = None
        return arriving

    def _splits(self, *, is_back: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.received, self.sent) if is_back else (self.sent, self.received)


class _Depart(torch.autograd.Function):
    """Rows leave; in the backward pass their gradients arrive. Returns a ticket of no elements.

    Not where the rows will be: as many gradients come back as rows have left, and autograd wants as many as
    rows arrive.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.start(rows, is_back=False)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.finish(is_back=True), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.finish(is_back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.start(grads[0], is_back=True)
        return grads[0].new_empty(0), None


def _end(n_rows: int, i: int, n_chunks: int) -> int:
    """Return where part i of rows ends that are cut into n_trips equal parts."""
    return n_rows * (i + 1) // n_chunks


def _by_chunk(sent: list[int], n_chunks: int, n_rows: int) -> Tensor:
    """Return the order [N] in which rows sorted by receiver are sorted by trip; dropped rows stay last."""
    first_of = [0, *itertools.accumulate(sent)]
    parts = [
        torch.arange(first + _end(n, i - 1, n_chunks), first + _end(n, i, n_chunks))
        for i in range(n_chunks)
        for first, n in zip(first_of, sent, strict=False)
    ]
    return torch.cat([*parts, torch.arange(first_of[-1], n_rows)])
