"""Send routed rows to the ranks that own their experts, and bring the results back.

Contract: combine(dispatch(rows)) with identity experts returns the rows, and the same holds for gradients.
Nothing here knows about scores: routing weights [M] are sent in the same way as rows [M, D].

A layer's rows are sent in chunks, usually one. Several chunks keep a rank's memory within a limit when the
routing sends it too many rows, or let a rank compute one chunk while the next one is being sent.

Shapes
  N routed rows that a rank sends   M rows of one chunk sent   R rows of one chunk received   E n_experts
  L experts on this rank   P ranks of the expert-parallel group
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.moe.experts.permute import invert, permute_rows
from turnout.moe.parallel.record import Record, no_record

# Waits for rows that are being sent, and returns them. It is called once.
Wait = Callable[[], Tensor]


@dataclass(frozen=True)
class Chunk:
    """Rows that are sent together.

    counts_L     [L] int64 rows of each local expert, sum R
    sent         rows to each rank of the group, sum M
    received     rows from each rank, sum R
    order_R, inverse_R  [R] from received rows (by sender) to rows by local expert; None: already in order
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
    """How the rows of one layer are sent: in the same number of chunks on every rank of the group.

    order_N        [N] from rows sorted by expert to rows sorted by chunk, then by expert; None: no change
    is_over_limit  some rank receives more rows than the limit: only one chunk's activations may be kept
    n_extra        chunks that only this limit makes necessary
    """

    chunks: tuple[Chunk, ...]
    order_N: Tensor | None = None
    is_over_limit: bool = False
    n_extra: int = 0


class Dispatcher(Protocol):
    def n_local_experts(self, n_experts: int) -> int:
        """Return how many experts this rank holds."""
        ...

    def at_layer(self, layer: int) -> Self:
        """Return a dispatcher that names this layer in its records."""
        ...

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        """Agree with the other ranks on who sends how many rows to whom; at most one device sync.

        counts_E  [E] int64, rows that this rank sends to each expert
        n_rows    the rows that this rank has; more than the sum of counts_E if rows are dropped
        """
        ...

    def dispatch(self, rows: Tensor, chunk: Chunk) -> Wait:
        """Start to send each row to its expert's rank: from [M, ...] sorted by expert id to [R, ...] sorted
        by local expert. R differs per rank, chunk and step; zero is legal.
        """
        ...

    def combine(self, rows: Tensor, chunk: Chunk) -> Wait:
        """Start to send rows [R, ...] back to where they came from, [M, ...]."""
        ...


class LocalDispatcher:
    """Every expert is on this rank, so rows stay where they are."""

    def n_local_experts(self, n_experts: int) -> int:
        return n_experts

    def at_layer(self, layer: int) -> Self:
        return self

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        n_kept = n_rows if is_dropless else int(counts_E.sum())
        return Route((Chunk(counts_E, (n_kept,), (n_kept,)),))

    def dispatch(self, rows: Tensor, chunk: Chunk) -> Wait:
        """Return a function that returns rows [M, ...] as they are."""
        return lambda: rows

    def combine(self, rows: Tensor, chunk: Chunk) -> Wait:
        """Return a function that returns rows [R, ...] as they are."""
        return lambda: rows


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Experts are spread over a group: rank p of P holds experts p * L to (p + 1) * L - 1.

    max_load    cap on the rows that a rank receives in one chunk, as a multiple of the mean over ranks; None:
                no cap
    min_chunks  chunks of every layer, whatever its routing
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
        counts = torch.cat([rows_PP[rank], rows_PP[:, rank], loads_P.max()[None], loads_P.sum()[None]])
        *both, busiest, total = counts.tolist()
        sent, received = both[:n_ranks], both[n_ranks:]
        n_needed = self._n_chunks(busiest, total / n_ranks)
        n_chunks = max(n_needed, self.min_chunks)
        chunks = tuple(self._chunk(counts_PPL[:, rank], sent, received, i, n_chunks) for i in range(n_chunks))
        order_N = _by_chunk(sent, n_chunks, n_rows).to(counts_E.device) if n_chunks > 1 else None
        return Route(chunks, order_N, is_over_limit=n_needed > 1, n_extra=n_chunks - self.min_chunks)

    def _n_chunks(self, busiest: int, mean: float) -> int:
        """Return the number of chunks that keeps the busiest rank within the limit.

        Rounding can add one row of each sender.
        """
        if self.max_load is None or not busiest:
            return 1
        return min(busiest, math.ceil(busiest / (self.max_load * mean)))

    def _chunk(self, counts_PL: Tensor, sent: list[int], received: list[int], i: int, n_chunks: int) -> Chunk:
        """Return chunk i of n_chunks: an equal part of each sender's rows for each receiver."""
        stop_PL = counts_PL.cumsum(1)
        total_P1 = stop_PL[:, -1:]
        first_P1, last_P1 = total_P1 * i // n_chunks, total_P1 * (i + 1) // n_chunks
        part_PL = stop_PL.minimum(last_P1) - (stop_PL - counts_PL).maximum(first_P1)
        part_PL = part_PL.clamp(min=0)
        received_now = [_end(n, i, n_chunks) - _end(n, i - 1, n_chunks) for n in received]
        expert_R = torch.arange(part_PL.size(1), device=part_PL.device).repeat(part_PL.size(0))
        expert_R = expert_R.repeat_interleave(part_PL.flatten(), output_size=sum(received_now))
        order_R = expert_R.sort(stable=True).indices
        return Chunk(
            counts_L=part_PL.sum(0),
            sent=tuple(_end(n, i, n_chunks) - _end(n, i - 1, n_chunks) for n in sent),
            received=tuple(received_now),
            order_R=order_R,
            inverse_R=invert(order_R),
        )

    def dispatch(self, rows: Tensor, chunk: Chunk) -> Wait:
        """Start an all-to-all of rows [M, ...]; waiting for it returns [R, ...], sorted by local expert."""
        order_R, inverse_R = chunk.order_R, chunk.inverse_R
        assert order_R is not None and inverse_R is not None
        wait = self._exchange(rows, chunk.sent, chunk.received)
        return lambda: permute_rows(wait(), order_R, inverse_R)

    def combine(self, rows: Tensor, chunk: Chunk) -> Wait:
        """Start the all-to-all back, of rows [R, ...]; waiting for it returns [M, ...]."""
        assert chunk.order_R is not None and chunk.inverse_R is not None
        rows = permute_rows(rows, chunk.inverse_R, chunk.order_R)
        return self._exchange(rows, chunk.received, chunk.sent)

    def send(
        self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> tuple[Callable[[], object], Tensor]:
        """Start to send rows [M, ...]: the first sent[0] rows to rank 0, and so on.

        Returns a function that waits for the end, and the buffer [R, ...] that then holds the received rows,
        by sender.
        """
        received_rows = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            received_rows, rows, list(received), list(sent), group=self.group, async_op=True
        )
        return work.wait, received_rows

    def _exchange(self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Wait:
        exchange = _Exchange(self, sent, received)
        link = _start(rows, exchange)
        return lambda: _finish(link, exchange)


class _Exchange:
    """One all-to-all of rows in the forward pass, and the reverse one of their gradients in backward."""

    def __init__(
        self, dispatcher: AllToAllDispatcher, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> None:
        self.dispatcher, self.sent, self.received = dispatcher, sent, received
        self._running: tuple[Callable[[], object], Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, is_backward: bool) -> None:
        rows = rows.contiguous()
        wait, received_rows = self.dispatcher.send(rows, *self._splits(is_backward=is_backward))
        self._running = wait, received_rows, rows  # rows must stay in memory until they have been sent

    def finish(self, *, is_backward: bool) -> Tensor:
        """Wait for the rows, and return them."""
        sent, received = self._splits(is_backward=is_backward)
        assert self._running is not None
        wait, received_rows, _ = self._running
        layer = self.dispatcher.layer
        with self.dispatcher.record("all-to-all of rows", "ep", layer=layer, sent=sent, received=received):
            wait()
        self._running = None
        return received_rows

    def _splits(self, *, is_backward: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.received, self.sent) if is_backward else (self.sent, self.received)


class _Start(torch.autograd.Function):
    """Start to send rows; in backward, wait for their gradients.

    Returns an empty tensor, which links _Finish to this node of the autograd graph. It cannot return the
    buffer of received rows: backward receives M gradients, but autograd would expect R.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(rows, is_backward=False)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(is_backward=True), None


class _Finish(torch.autograd.Function):
    """Wait for the rows; in backward, start to send their gradients."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish(is_backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grads[0], is_backward=True)
        return grads[0].new_empty(0), None


# torch gives Function.apply no types.
_start: Callable[[Tensor, _Exchange], Tensor] = _Start.apply
_finish: Callable[[Tensor, _Exchange], Tensor] = _Finish.apply


def _end(n_rows: int, i: int, n_chunks: int) -> int:
    """Return where part i ends when n_rows are cut into n_chunks equal parts."""
    return n_rows * (i + 1) // n_chunks


def _by_chunk(sent: list[int], n_chunks: int, n_rows: int) -> Tensor:
    """Return the order [N] from rows sorted by receiver to rows sorted by chunk; dropped rows stay last."""
    first_of = [0, *itertools.accumulate(sent)]
    parts = [
        torch.arange(first + _end(n, i - 1, n_chunks), first + _end(n, i, n_chunks))
        for i in range(n_chunks)
        for first, n in zip(first_of, sent, strict=False)
    ]
    return torch.cat([*parts, torch.arange(first_of[-1], n_rows)])
