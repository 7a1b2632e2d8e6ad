"""The routed experts: one SwiGLU each, on rows that are sorted by expert.

Shapes
  R rows on this rank   D d_model   F d_expert   J 2 * d_expert: gate, then up   L experts on this rank

Gate and up are one matrix, with the inner width last: one product instead of two, and on a CPU in half
precision one that is up to half again as fast as with rows of D (tests/bench, `experts`).

Several backends compute the same thing; `reference` is the one to check by eye. Nothing here knows which
token a row came from.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.sorted_loop import compiled_loop_experts, sorted_loop_experts

# (rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF) -> results_RD, each times its row's weight
ExpertBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reference_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply each expert to its own rows, one after the other. Any dtype; one device sync."""
    outputs = []
    counts = counts_L.tolist()
    pieces = zip(rows_RD.split(counts), weights_R.split(counts), strict=True)
    # unbind, not gate_up_LDJ[e]: the backward of indexing would fill a whole [L, D, J] gradient per expert.
    matrices = zip(gate_up_LDJ.unbind(), down_LDF.unbind(), strict=True)
    for (x, weights), (gate_up, down) in zip(pieces, matrices, strict=True):
        # Where a gradient can follow, an expert without rows takes part too: its gradient is 0, not missing.
        if x.size(0) or torch.is_grad_enabled():
            gates, ups = (x @ gate_up).chunk(2, dim=1)
            hidden = F.silu(gates) * ups
            outputs.append(F.linear(hidden * weights.to(x.dtype).unsqueeze(1), down))
    return torch.cat(outputs) if outputs else rows_RD


def torch_grouped_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply all experts by torch's grouped matrix product: fp32, bf16 or fp16.

    No device sync on sm_90 and newer.

    Rows past the last expert's would come out uninitialised, so counts_L must sum to R.
    """
    offsets_L = counts_L.cumsum(0).to(torch.int32)
    gates_RF, ups_RF = F.grouped_mm(rows_RD, gate_up_LDJ, offs=offsets_L).chunk(2, dim=1)
    hidden_RF = F.silu(gates_RF) * ups_RF * weights_R.to(rows_RD.dtype).unsqueeze(1)
    return F.grouped_mm(hidden_RF, down_LDF.transpose(1, 2), offs=offsets_L)


EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    "reference": reference_experts,
    "sorted_loop": sorted_loop_experts,
    "compiled_loop": compiled_loop_experts,
    "torch_grouped": torch_grouped_experts,
}


def choose_backend(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend for a device: torch_grouped where its kernels need no host, else sorted_loop.

    Before sm_90 torch's grouped product is a loop, too, which waits for the device (pytorch#186620).
    """
    can_group = dtype.itemsize == 2 and not cfg.d_model % 8 and not cfg.d_expert % 8
    if can_group and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return "torch_grouped"
    return "sorted_loop"


class Experts(nn.Module):
    """Weights of n_local experts, stored once as [L, D, J] (gate and up) and [L, D, F] (down)."""

    def __init__(self, cfg: ModelConfig, n_local: int, backend: str) -> None:
        super().__init__()
        if backend not in EXPERT_BACKENDS:
            raise ValueError(
                f"expert backend {backend!r} does not exist; use one of {sorted(EXPERT_BACKENDS)}"
            )
        if backend == "torch_grouped" and (cfg.d_model % 8 or cfg.d_expert % 8):
            raise ValueError(
                f"expert backend 'torch_grouped' needs rows of whole 16 bytes: d_model={cfg.d_model} and "
                f"d_expert={cfg.d_expert} must be multiples of 8; change them, or use backend 'sorted_loop'"
            )
        self.backend = EXPERT_BACKENDS[backend]
        self.gate_up = nn.Parameter(torch.empty(n_local, cfg.d_model, 2 * cfg.d_expert))
        self.down = nn.Parameter(torch.empty(n_local, cfg.d_model, cfg.d_expert))

    def forward(self, rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor) -> Tensor:
        """Return each row's result times its weight.

        rows_RD [R, D] sorted by expert, weights_R [R], counts_L [L] int64 with sum R; R = 0 is legal.
        """
        return self.backend(rows_RD, weights_R, counts_L, self.gate_up, self.down)
