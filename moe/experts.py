"""The routed experts: one SwiGLU each, on rows that are sorted by expert.

Shapes
  R rows on this rank   D d_model   F d_expert   L experts on this rank

Several backends compute the same thing; `reference` is the one to check by eye. Nothing here knows which
token a row came from or how it is weighted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig

# (rows_RD, counts_L, gate_LFD, up_LFD, down_LDF) -> rows_RD
ExpertBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reference_experts(
    rows_RD: Tensor, counts_L: Tensor, gate_LFD: Tensor, up_LFD: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply each expert to its own rows, one after the other. Any dtype; one device sync."""
    outputs = []
    pieces = rows_RD.split(counts_L.tolist())
    # unbind, not gate_LFD[e]: the backward of indexing would fill a whole [L, F, D] gradient per expert.
    for x, gate, up, down in zip(pieces, gate_LFD.unbind(), up_LFD.unbind(), down_LDF.unbind(), strict=True):
        # Where a gradient can follow, an expert without rows takes part too: its gradient is 0, not missing.
        if x.size(0) or torch.is_grad_enabled():
            outputs.append(F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))
    return torch.cat(outputs) if outputs else rows_RD


def grouped_experts(
    rows_RD: Tensor, counts_L: Tensor, gate_LFD: Tensor, up_LFD: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply all experts by torch's grouped matrix product: fp32, bf16 or fp16.

    No device sync on sm_90 and newer.

    Rows past the last expert's would come out uninitialised, so counts_L must sum to R.
    """
    offsets_L = counts_L.cumsum(0).to(torch.int32)
    gate_RF = F.grouped_mm(rows_RD, gate_LFD.transpose(1, 2), offs=offsets_L)
    up_RF = F.grouped_mm(rows_RD, up_LFD.transpose(1, 2), offs=offsets_L)
    return F.grouped_mm(F.silu(gate_RF) * up_RF, down_LDF.transpose(1, 2), offs=offsets_L)


EXPERT_BACKENDS: dict[str, ExpertBackend] = {"reference": reference_experts, "grouped": grouped_experts}


class Experts(nn.Module):
    """Weights of n_local experts, stored once as [L, F, D] (gate, up) and [L, D, F] (down)."""

    def __init__(self, cfg: ModelConfig, n_local: int, backend: str) -> None:
        super().__init__()
        if backend not in EXPERT_BACKENDS:
            raise ValueError(
                f"expert backend {backend!r} does not exist; use one of {sorted(EXPERT_BACKENDS)}"
            )
        if backend == "grouped" and (cfg.d_model % 8 or cfg.d_expert % 8):
            raise ValueError(
                f"expert backend 'grouped' needs rows of whole 16 bytes: d_model={cfg.d_model} and "
                f"d_expert={cfg.d_expert} must be multiples of 8; change them, or use backend 'reference'"
            )
        self.backend = EXPERT_BACKENDS[backend]
        self.gate = nn.Parameter(torch.empty(n_local, cfg.d_expert, cfg.d_model))
        self.up = nn.Parameter(torch.empty(n_local, cfg.d_expert, cfg.d_model))
        self.down = nn.Parameter(torch.empty(n_local, cfg.d_model, cfg.d_expert))

    def forward(self, rows_RD: Tensor, counts_L: Tensor) -> Tensor:
        """rows_RD [R, D] sorted by expert, counts_L [L] int64 with sum R; R = 0 is legal."""
        return self.backend(rows_RD, counts_L, self.gate, self.up, self.down)
