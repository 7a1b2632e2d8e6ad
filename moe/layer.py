"""The expert layer: router -> dispatch -> experts -> combine, plus the shared experts.

Shapes
  T tokens   D d_model   E n_experts   K top_k   N routed rows = T*K

Under tensor parallelism each rank dispatches its own T / tp.size tokens, so that no row is sent twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe.balance import RouterStats
from moe.config import ModelConfig
from moe.dispatch import Arrival, Dispatcher, Route, Trip
from moe.experts import Experts
from moe.ffn import SwiGLU
from moe.permute import invert, permute_rows
from moe.recompute import Recompute, RoutingMemo, recompute_if
from moe.router import Router, Routing
from moe.tensor_parallel import TensorParallel


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
        stats = replace(stats, n_extra_trips=torch.full_like(stats.n_dropped, sent.route.n_extra))
        return out if shared is None else out + shared, stats

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
        order_N = destination_N.sort(stable=True).indices
        if memo.route is None:
            counts_E = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=x_TD.device)
            counts_E = counts_E.scatter_add_(0, destination_N, torch.ones_like(destination_N))[:-1]
            memo.route = self.dispatcher.plan(
                counts_E, destination_N.numel(), is_dropless=routing.is_kept_TK is None
            )
        route = memo.route
        if route.order_N is not None:
            order_N = order_N[route.order_N]
        inverse_N = invert(order_N)
        rows_ND = self.experts.backend.copy_rows(x_TD, order_N, inverse_N, top_k)
        weights_N = permute_rows(routing.weights_TK.flatten(), order_N, inverse_N)
        cuts = [trip.n_sent for trip in route.trips]
        cuts.append(order_N.numel() - sum(cuts))  # dropped rows
        *rows, dropped = rows_ND.split(cuts)
        *weights, _ = weights_N.split(cuts)
        sent = _Sent(route, rows, weights, torch.zeros_like(dropped), order_N, inverse_N, top_k)
        if not route.is_over_limit:
            sent.underway = self._depart(sent, 0)
        return sent

    def _depart(self, sent: "_Sent", i: int) -> tuple[Arrival, Arrival]:
        trip = sent.route.trips[i]
        rows, weights = (self.dispatcher.dispatch(part[i], trip) for part in (sent.rows, sent.weights))
        return rows, weights

    def _receive(self, sent: "_Sent") -> Tensor:
        """Compute the rows trip by trip; return [T, D], of each token the sum of its rows."""
        trips, returning, results = sent.route.trips, list[Arrival](), list[Tensor]()
        if sent.route.is_over_limit:
            for load in zip(sent.rows, sent.weights, trips, strict=True):
                results.append(recompute_if(True, self._make_trip, *load))
        else:
            for i, trip in enumerate(trips):
                assert sent.underway is not None
                rows_RD, weights_R = (part.wait() for part in sent.underway)
                # The next rows travel while these are computed.
                sent.underway = self._depart(sent, i + 1) if i + 1 < len(trips) else None
                done = recompute_if(self.recomputes, self.experts, rows_RD, weights_R, trip.counts_L)
                returning.append(self.dispatcher.combine(done, trip))
            results = [arrival.wait() for arrival in returning]
        rows_ND = torch.cat([*results, sent.dropped])
        return self.experts.backend.sum_rows(rows_ND, sent.order_N, sent.inverse_N, sent.top_k)

    def _make_trip(self, rows: Tensor, weights: Tensor, trip: Trip) -> Tensor:
        rows_RD, weights_R = (self.dispatcher.dispatch(part, trip).wait() for part in (rows, weights))
        return self.dispatcher.combine(self.experts(rows_RD, weights_R, trip.counts_L), trip).wait()


@dataclass
class _Sent:
    """A layer's rows, trip by trip, in the order of order_N [N]; of those on their way the arrivals."""

    route: Route
    rows: Sequence[Tensor]
    weights: Sequence[Tensor]
    dropped: Tensor
    order_N: Tensor
    inverse_N: Tensor
    top_k: int
    underway: tuple[Arrival, Arrival] | None = None
