"""The expert layer: router -> dispatch -> experts -> combine, plus the shared experts.

Shapes
  T tokens   D d_model   E n_experts   K top_k   N routed rows = T*K

Under tensor parallelism each rank dispatches its own T / tp.size tokens, so that no row is sent twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from turnout.moe.config import ModelConfig
from turnout.moe.experts.experts import Experts
from turnout.moe.experts.permute import invert, permute_rows
from turnout.moe.layers import SwiGLU
from turnout.moe.load_balancing import RouterStats
from turnout.moe.parallel.expert_parallel import Chunk, Dispatcher, Wait
from turnout.moe.parallel.tensor_parallel import TensorParallel
from turnout.moe.recompute import Recompute, RoutingMemo, recompute_if
from turnout.moe.router import Router, Routing
from turnout.moe.torch_compile import uncompiled


class MoELayer(nn.Module):
    """Routed experts, and shared experts if the model has them."""

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
        """Return the layer's output, [T, D] as x (without the residual), and the router's statistics.

        Under sequence parallelism x holds this rank's tokens only.
        """
        own = self.tp.own_tokens(x)
        routing, stats = self.router(own, bias_E, load_frac_E, is_counted_T, memo)
        sent = self._send(own, self._own_routing(routing), memo)
        shared = None if self.shared is None else self.shared(x)  # while the rows are being sent
        out = self.tp.join_tokens(self._receive(sent))
        return out if shared is None else out + shared, _count_chunks(stats, memo)

    def infer(self, x_TD: Tensor, bias_E: Tensor) -> Tensor:
        """Return the layer's output for any number of tokens.

        Dropless whatever the capacity factor: which rows an expert drops is known only at a sequence's end.
        """
        out = self._receive(self._send(x_TD, self.router.route(x_TD, bias_E), RoutingMemo()))
        return out if self.shared is None else out + self.shared(x_TD)

    def _own_routing(self, routing: Routing) -> Routing:
        """Return the routing of this rank's tokens. A slice keeps the gradient of the weights."""
        if self.tp.size == 1:
            return routing
        n_own = routing.weights_TK.size(0) // self.tp.size
        mine = slice(self.tp.rank * n_own, (self.tp.rank + 1) * n_own)
        is_kept_TK = None if routing.is_kept_TK is None else routing.is_kept_TK[mine]
        return Routing(routing.expert_ids_TK[mine], routing.weights_TK[mine], is_kept_TK)

    def _send(self, x_TD: Tensor, routing: Routing, memo: RoutingMemo) -> "_Sent":
        """Sort the rows of all tokens, and start to send the first chunk."""
        top_k = routing.expert_ids_TK.size(1)
        destination_N = routing.expert_ids_TK.flatten()
        if routing.is_kept_TK is not None:
            # Dropped rows sort behind every expert, so no chunk contains them.
            destination_N = destination_N.masked_fill(~routing.is_kept_TK.flatten(), self.n_experts)
        order_N = self._plan(destination_N, memo, is_dropless=routing.is_kept_TK is None)
        inverse_N = invert(order_N)
        rows_ND = self.experts.backend.copy_rows(x_TD, order_N, inverse_N, top_k)
        weights_N = permute_rows(routing.weights_TK.flatten(), order_N, inverse_N)
        return self._start(rows_ND, weights_N, memo, order_N, inverse_N, top_k)

    def _receive(self, sent: "_Sent") -> Tensor:
        """Return each token's sum of its experts' weighted results, [T, D]."""
        rows_ND = self._compute(sent)
        return self.experts.backend.sum_rows(rows_ND, sent.order_N, sent.inverse_N, sent.top_k)

    # Here and below: torch.compile would compile this again for every routing.
    @uncompiled
    def _plan(self, destination_N: Tensor, memo: RoutingMemo, *, is_dropless: bool) -> Tensor:
        """Agree with the other ranks on the route; return the order in which rows are sent, [N]."""
        order_N = destination_N.sort(stable=True).indices
        if memo.route is None:
            counts_E = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=order_N.device)
            counts_E = counts_E.scatter_add_(0, destination_N, torch.ones_like(destination_N))[:-1]
            memo.route = self.dispatcher.plan(counts_E, order_N.numel(), is_dropless=is_dropless)
        return order_N if memo.route.order_N is None else order_N[memo.route.order_N]

    @uncompiled
    def _start(
        self,
        rows_ND: Tensor,
        weights_N: Tensor,
        memo: RoutingMemo,
        order_N: Tensor,
        inverse_N: Tensor,
        top_k: int,
    ) -> "_Sent":
        """Cut the rows into chunks, and start to send the first one."""
        route = memo.route
        assert route is not None
        cuts = [chunk.n_sent for chunk in route.chunks]
        n_dropped = rows_ND.size(0) - sum(cuts)
        cuts += [n_dropped] if n_dropped else []
        rows, weights = _split(rows_ND, cuts), _split(weights_N, cuts)
        parts = list(zip(rows, weights, route.chunks, strict=False))
        first = None if route.is_over_limit else self._dispatch(*parts[0])
        dropped = torch.zeros_like(rows[-1]) if n_dropped else None
        return _Sent(order_N, inverse_N, top_k, parts, first, dropped)

    @uncompiled
    def _compute(self, sent: "_Sent") -> Tensor:
        """Compute the rows chunk by chunk; return the results in the order of the sent rows, [N, D]."""
        if sent.first is None:
            # Each tensor is an argument of its own: in a recomputed block, checkpoint would keep in memory
            # the tensors inside any other object.
            results = [recompute_if(True, self._compute_chunk, *part) for part in sent.parts]
        else:
            arriving, returning = sent.first, list[Wait]()
            for i, (_, _, chunk) in enumerate(sent.parts):
                rows_RD, weights_R = (wait() for wait in arriving)
                if i + 1 < len(sent.parts):
                    # The next chunk is sent while this one is computed.
                    arriving = self._dispatch(*sent.parts[i + 1])
                done = recompute_if(self.recomputes, self.experts, rows_RD, weights_R, chunk.counts_L)
                returning.append(self.dispatcher.combine(done, chunk))
            results = [wait() for wait in returning]
        if sent.dropped is not None:
            results.append(sent.dropped)
        return torch.cat(results) if len(results) > 1 else results[0]

    def _dispatch(self, rows: Tensor, weights: Tensor, chunk: Chunk) -> tuple[Wait, Wait]:
        return self.dispatcher.dispatch(rows, chunk), self.dispatcher.dispatch(weights, chunk)

    def _compute_chunk(self, rows: Tensor, weights: Tensor, chunk: Chunk) -> Tensor:
        rows_RD, weights_R = (wait() for wait in self._dispatch(rows, weights, chunk))
        return self.dispatcher.combine(self.experts(rows_RD, weights_R, chunk.counts_L), chunk)()


def _split(rows: Tensor, cuts: list[int]) -> Sequence[Tensor]:
    # The backward pass of a split copies all gradients, even if nothing was cut.
    return rows.split(cuts) if len(cuts) > 1 else [rows]


@uncompiled
def _count_chunks(stats: RouterStats, memo: RoutingMemo) -> RouterStats:
    assert memo.route is not None
    return replace(stats, n_extra_chunks=torch.full_like(stats.n_dropped, memo.route.n_extra))


@dataclass(frozen=True)
class _Sent:
    """A layer's rows, cut into chunks. Only the first chunk is sent at once.

    order_N, inverse_N  [N] from rows by token, top_k of each, to rows in the order in which they are sent
    parts    rows [M, D] and weights [M] of each chunk
    first    waits for rows and weights of the first chunk; None: over the limit, so each chunk is sent only
             when it is computed
    dropped  zeros [rows, D] in place of the rows that no expert computes; None: there are no such rows
    """

    order_N: Tensor
    inverse_N: Tensor
    top_k: int
    parts: list[tuple[Tensor, Tensor, Chunk]]
    first: tuple[Wait, Wait] | None
    dropped: Tensor | None
