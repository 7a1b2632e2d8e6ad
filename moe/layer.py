"""The expert layer: router -> dispatch -> experts -> combine, plus the shared experts.

Shapes
  T tokens   D d_model   E n_experts   K top_k   N routed rows = T*K

Under tensor parallelism each rank dispatches its own T / tp.size tokens, so that no row is sent twice.
"""

import torch
from torch import Tensor, nn

from moe.balance import RouterStats
from moe.config import ModelConfig
from moe.dispatch import Dispatcher
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
        out = self.tp.join_tokens(self._mix(own, self._own_routing(routing), memo))
        if self.shared is not None:
            out = out + self.shared(x)
        return out, stats

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
        top_k = routing.expert_ids_TK.size(1)
        destination_N = routing.expert_ids_TK.flatten()
        if routing.is_kept_TK is not None:
            # Dropped rows sort behind every expert, where the dispatcher leaves them out.
            destination_N = destination_N.masked_fill(~routing.is_kept_TK.flatten(), self.n_experts)
        order_N = destination_N.sort(stable=True).indices
        inverse_N = invert(order_N)
        if memo.route is None:
            counts_E = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=x_TD.device)
            counts_E = counts_E.scatter_add_(0, destination_N, torch.ones_like(destination_N))[:-1]
            memo.route = self.dispatcher.plan(
                counts_E, destination_N.numel(), is_dropless=routing.is_kept_TK is None
            )
        route, backend = memo.route, self.experts.backend
        rows_ND = backend.copy_rows(x_TD, order_N, inverse_N, top_k)
        weights_N = permute_rows(routing.weights_TK.flatten(), order_N, inverse_N)
        rows_RD, weights_R = (self.dispatcher.dispatch(part, route) for part in (rows_ND, weights_N))
        rows_RD = recompute_if(self.recomputes, self.experts, rows_RD, weights_R, route.counts_L)
        return backend.sum_rows(self.dispatcher.combine(rows_RD, route), order_N, inverse_N, top_k)
