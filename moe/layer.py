"""The expert layer: router -> dispatch -> experts -> combine, plus the shared experts.

Shapes
  T tokens   D d_model   E n_experts   K top_k   N routed rows = T*K
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.balance import RouterStats
from moe.config import ModelConfig
from moe.dispatch import Dispatcher
from moe.experts import Experts
from moe.ffn import SwiGLU
from moe.permute import copy_rows, invert, permute_rows
from moe.router import Router, Routing


class MoELayer(nn.Module):
    def __init__(self, cfg: ModelConfig, dispatcher: Dispatcher, expert_backend: str) -> None:
        super().__init__()
        self.n_experts = cfg.n_experts
        self.dispatcher = dispatcher
        self.router = Router(cfg)
        self.experts = Experts(cfg, dispatcher.n_local_experts(cfg.n_experts), expert_backend)
        self.shared = SwiGLU(cfg.d_model, cfg.d_shared) if cfg.n_shared_experts else None

    def forward(
        self, x_TD: Tensor, bias_E: Tensor, load_frac_E: Tensor, is_counted_T: Tensor
    ) -> tuple[Tensor, RouterStats]:
        """Return the layer's output [T, D] (without the residual) and what the router learned."""
        routing, stats = self.router(x_TD, bias_E, load_frac_E, is_counted_T)
        out_TD = self._mix(x_TD, routing)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        return out_TD, stats

    def _mix(self, x_TD: Tensor, routing: Routing) -> Tensor:
        n_tokens, top_k = routing.expert_ids_TK.shape
        destination_N = routing.expert_ids_TK.flatten()
        if routing.is_kept_TK is not None:
            # Dropped rows sort behind every expert and are cut off there.
            destination_N = destination_N.masked_fill(~routing.is_kept_TK.flatten(), self.n_experts)
        order_N = destination_N.sort(stable=True).indices
        inverse_N = invert(order_N)
        counts_E = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=x_TD.device)
        counts_E = counts_E.scatter_add_(0, destination_N, torch.ones_like(destination_N))[: self.n_experts]
        rows_ND = copy_rows(x_TD, order_N, inverse_N, top_k)
        if routing.is_kept_TK is not None:
            rows_ND = rows_ND[: int(counts_E.sum())]

        rows_RD, counts_L, route = self.dispatcher.dispatch(rows_ND, counts_E)
        rows_ND = self.dispatcher.combine(self.experts(rows_RD, counts_L), route)

        if routing.is_kept_TK is not None:
            rows_ND = F.pad(rows_ND, (0, 0, 0, n_tokens * top_k - rows_ND.size(0)))
        rows_TKD = permute_rows(rows_ND, inverse_N, order_N).view(n_tokens, top_k, -1)
        weights_T1K = routing.weights_TK.to(rows_TKD.dtype).unsqueeze(1)
        return torch.bmm(weights_T1K, rows_TKD).squeeze(1)
