"""The expert layer: router -> dispatch -> experts -> combine, plus the shared experts.

Shapes
  T tokens   D d_model   E n_experts   K top_k   N routed rows = T*K

Under tensor parallelism each rank dispatches its own T / tp.size tokens, so that no row is sent twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from turnout.moe.config import ModelConfig
from turnout.moe.experts.experts import Experts
from turnout.moe.experts.permute import invert, permute_rows
from turnout.moe.layers import SwiGLU
from turnout.moe.load_balancing import RouterStats
from turnout.moe.parallel.expert_parallel import Arrival, Chunk, Dispatcher, Route
from turnout.moe.parallel.tensor_parallel import TensorParallel
from turnout.moe.recompute import Recompute, RoutingMemo, recompute_if
from turnout.moe.router import Router, Routing
from turnout.moe.torch_compile import uncompiled


class MoELayer(nn.Module):
    def __init__(
        self,
        cfg: ModelConfig,
        dispatcher: Dispatcher,
        tp: TensorParallel,
        expert_backend: str,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.n_experts = cfg.n_experts
        self.dispatcher, self.tp, self.recomputes = dispatcher, tp, recompute == "selective"
        self.router = Router(cfg, tp)
        self.experts = Experts(cfg, dispatcher.n_local_experts(cfg.n_experts), expert_backend)
        self.shared = SwiGLU(cfg.d_model, cfg.d_shared, tp, recompute) if cfg.n_shared_experts else None

    def forward(
        self, x: Tensor, bias_E: Tensor, load_frac_E: Tensor, is_counted_T: Tensor, memo: RoutingMemo
    ) -> tuple[Tensor, RouterStats]:
        """Return the layer's output, shaped as x [T, D] (without the residual), and what the router learned.

        Under sequence parallelism x holds this rank's tokens only.
        """
        own = self.tp.own_tokens(x)
        routing, stats = self.router(own, bias_E, load_frac_E, is_counted_T, memo)
        sent = self._send(own, self._own_routing(routing), memo)
        shared = None if self.shared is None else self.shared(x)  # while the rows travel
        out = self.tp.join_tokens(self._receive(sent))
        return out if shared is None else out + shared, _count_chunks(stats, memo)

    def infer(self, x_TD: Tensor, bias_E: Tensor) -> Tensor:
        """Return the layer's output for any number of tokens.

        Dropless whatever the capacity factor: what an expert takes of a sequence is not known before its end.
        """
        out = self._mix(x_TD, self.router.route(x_TD, bias_E), RoutingMemo())
        return out if self.shared is None else out + self.shared(x_TD)

    def _own_routing(self, routing: Routing) -> Routing:
        """Return the rows of this rank's tokens; weights carry gradient, so they are cut by slicing."""
        if self.tp.size == 1:
            return routing
        n_own = routing.weights_TK.size(0) // self.tp.size
        mine = slice(self.tp.rank * n_own, (self.tp.rank + 1) * n_own)
        is_kept_TK = None if routing.is_kept_TK is None else routing.is_kept_TK[mine]
        return Routing(routing.expert_ids_TK[mine], routing.weights_TK[mine], is_kept_TK)

    def _mix(self, x_TD: Tensor, routing: Routing, memo: RoutingMemo) -> Tensor:
        return self._receive(self._send(x_TD, routing, memo))

    def _send(self, x_TD: Tensor, routing: Routing, memo: RoutingMemo) -> "_Sent":
        """Sort the rows of all tokens, and send the first trip's on their way."""
        top_k = routing.expert_ids_TK.size(1)
        destination_N = routing.expert_ids_TK.flatten()
        if routing.is_kept_TK is not None:
            # Dropped rows sort behind every expert, where no trip takes them.
            destination_N = destination_N.masked_fill(~routing.is_kept_TK.flatten(), self.n_experts)
        order_N = self._plan(destination_N, memo, is_dropless=routing.is_kept_TK is None)
        inverse_N = invert(order_N)
        rows_ND = self.experts.backend.copy_rows(x_TD, order_N, inverse_N, top_k)
        weights_N = permute_rows(routing.weights_TK.flatten(), order_N, inverse_N)
        return _Sent(order_N, inverse_N, top_k, self._depart(rows_ND, weights_N, memo))

    def _receive(self, sent: "_Sent") -> Tensor:
        """Return [T, D]: of each token the sum of what its experts make of its rows."""
        rows_ND = self._compute(sent.travelling)
        return self.experts.backend.sum_rows(rows_ND, sent.order_N, sent.inverse_N, sent.top_k)

    # What torch.compile would have to do anew for another routing is left as it is, here and below.
    @uncompiled
    def _plan(self, destination_N: Tensor, memo: RoutingMemo, *, is_dropless: bool) -> Tensor:
        """Agree with the other ranks on the route; return the order in which rows leave, [N]."""
        order_N = destination_N.sort(stable=True).indices
        if memo.route is None:
            counts_E = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=order_N.device)
            counts_E = counts_E.scatter_add_(0, destination_N, torch.ones_like(destination_N))[:-1]
            memo.route = self.dispatcher.plan(counts_E, order_N.numel(), is_dropless=is_dropless)
        return order_N if memo.route.order_N is None else order_N[memo.route.order_N]

    @uncompiled
    def _depart(self, rows_ND: Tensor, weights_N: Tensor, memo: RoutingMemo) -> "_Travelling":
        """Cut the rows into trips, and send the first of them on its way."""
        route = memo.route
        assert route is not None
        cuts = [chunk.n_sent for chunk in route.chunks]
        n_dropped = rows_ND.size(0) - sum(cuts)
        cuts += [n_dropped] if n_dropped else []
        rows, weights = _split(rows_ND, cuts), _split(weights_N, cuts)
        loads = [_Load(*load) for load in zip(rows, weights, route.chunks, strict=False)]
        first = None if route.is_over_limit else self._dispatch(*loads[0])
        return _Travelling(route, loads, torch.zeros_like(rows[-1]) if n_dropped else None, first)

    @uncompiled
    def _compute(self, travelling: "_Travelling") -> Tensor:
        """Compute the rows trip by trip; return what comes back, [N, D]."""
        loads, results = travelling.loads, list[Tensor]()
        if travelling.route.is_over_limit:
            # Tensors as they are: of a recomputed block, checkpoint would keep what it does not know for one.
            results = [
                recompute_if(True, self._make_chunk, load.rows, load.weights, load.chunk) for load in loads
            ]
        else:
            arriving, returning = travelling.first, list[Arrival]()
            for i, load in enumerate(loads):
                assert arriving is not None
                rows_RD, weights_R = (part.wait() for part in arriving)
                # The next rows travel while these are computed.
                arriving = self._dispatch(*loads[i + 1]) if i + 1 < len(loads) else None
                done = recompute_if(self.recomputes, self.experts, rows_RD, weights_R, load.chunk.counts_L)
                returning.append(self.dispatcher.combine(done, load.chunk))
            results = [arrival.wait() for arrival in returning]
        parts = [*results, travelling.dropped] if travelling.dropped is not None else results
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _dispatch(self, rows: Tensor, weights: Tensor, chunk: Chunk) -> tuple[Arrival, Arrival]:
        return self.dispatcher.dispatch(rows, chunk), self.dispatcher.dispatch(weights, chunk)

    def _make_chunk(self, rows: Tensor, weights: Tensor, chunk: Chunk) -> Tensor:
        rows_RD, weights_R = (part.wait() for part in self._dispatch(rows, weights, chunk))
        return self.dispatcher.combine(self.experts(rows_RD, weights_R, chunk.counts_L), chunk).wait()


def _split(rows: Tensor, cuts: list[int]) -> Sequence[Tensor]:
    # In backward a split is a copy of all gradients, also where it cut nothing.
    return rows.split(cuts) if len(cuts) > 1 else [rows]


@uncompiled
def _count_chunks(stats: RouterStats, memo: RoutingMemo) -> RouterStats:
    assert memo.route is not None
    return replace(stats, n_extra_chunks=torch.full_like(stats.n_dropped, memo.route.n_extra))


class _Load(NamedTuple):
    """What leaves in one trip: rows [M, D] and their weights [M]."""

    rows: Tensor
    weights: Tensor
    chunk: Chunk


@dataclass(frozen=True)
class _Travelling:
    """A layer's rows, trip by trip; `first` of them on their way, where more than one may be kept.

    dropped: rows of zeros, in place of what no expert takes, if there are any
    """

    route: Route
    loads: Sequence[_Load]
    dropped: Tensor | None
    first: tuple[Arrival, Arrival] | None


@dataclass(frozen=True)
class _Sent:
    """Rows that left in the order of order_N [N], top_k of each token."""

    order_N: Tensor
    inverse_N: Tensor
    top_k: int
    travelling: _Travelling
