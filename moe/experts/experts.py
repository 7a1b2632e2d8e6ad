"""The routed experts: one SwiGLU each, on rows that are sorted by expert.

Shapes
  R rows on this rank   D d_model   F d_expert   J 2 * d_expert: gate, then up   L experts on this rank

Gate and up are one matrix, with the inner width last: one product instead of two. On a CPU in half precision
that product is up to 1.5 times as fast as with D last (tests/bench, `experts`).

Several backends compute the same results; `reference` is the one that a reader can check. Nothing here knows
which token a row came from.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.moe.config import ModelConfig
from turnout.moe.experts import megablocks_rows
from turnout.moe.experts.permute import copy_rows, sum_rows
from turnout.moe.experts.requirements import check_widths
from turnout.moe.experts.sorted_loop import compiled_loop_experts, sorted_loop_experts
from turnout.moe.experts.triton_grouped import triton_grouped_experts

# (rows_RD, weights_R, counts_L, gate_up_LDJ, down_LDF) -> results_RD, each times its row's weight
ApplyExperts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# (rows, order_N, inverse_N, n_copies) -> rows
MoveRows = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class ExpertBackend:
    """One way to compute an expert layer on this rank.

    apply      applies the experts to rows sorted by expert
    copy_rows  copies each token's rows, sorted by expert, before they are sent: as in moe/experts/permute.py
    sum_rows   sums each token's rows, after they were sent back
    """

    apply: ApplyExperts
    copy_rows: MoveRows = copy_rows
    sum_rows: MoveRows = sum_rows


def reference_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply each expert to its own rows, one after the other. Any dtype; one device sync."""
    outputs = []
    counts = counts_L.tolist()
    inputs = zip(rows_RD.split(counts), weights_R.split(counts), strict=True)
    # unbind, not gate_up_LDJ[e]: the backward of indexing would fill a whole [L, D, J] gradient per expert.
    matrices = zip(gate_up_LDJ.unbind(), down_LDF.unbind(), strict=True)
    for (x, weights), (gate_up, down) in zip(inputs, matrices, strict=True):
        # If a backward pass can follow, experts without rows run too: their gradient is 0, not missing.
        if x.size(0) or torch.is_grad_enabled():
            gates, ups = (x @ gate_up).chunk(2, dim=1)
            hidden = F.silu(gates) * ups
            outputs.append(F.linear(hidden * weights.to(x.dtype).unsqueeze(1), down))
    return torch.cat(outputs) if outputs else rows_RD


def torch_grouped_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply all experts by torch's grouped matrix product: fp32, bf16 or fp16.

    No device sync on sm_90 and newer. Results past the last expert's rows would be uninitialised, so counts_L
    must sum to R.
    """
    offsets_L = counts_L.cumsum(0).to(torch.int32)
    gates_RF, ups_RF = F.grouped_mm(rows_RD, gate_up_LDJ, offs=offsets_L).chunk(2, dim=1)
    hidden_RF = F.silu(gates_RF) * ups_RF * weights_R.to(rows_RD.dtype).unsqueeze(1)
    return F.grouped_mm(hidden_RF, down_LDF.transpose(1, 2), offs=offsets_L)


# moe/experts/requirements.py has the requirements of each.
EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    "reference": ExpertBackend(reference_experts),
    "sorted_loop": ExpertBackend(sorted_loop_experts),
    "compiled_loop": ExpertBackend(compiled_loop_experts),
    "torch_grouped": ExpertBackend(torch_grouped_experts),
    "megablocks": ExpertBackend(torch_grouped_experts, megablocks_rows.copy_rows, megablocks_rows.sum_rows),
    "triton_grouped": ExpertBackend(triton_grouped_experts),
}


def choose_backend(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend for a device: a grouped product if one needs no device sync, else sorted_loop."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return backend_of(cfg, capability, dtype, has_triton=importlib.util.find_spec("triton") is not None)


def backend_of(
    cfg: ModelConfig, capability: tuple[int, int] | None, dtype: torch.dtype, *, has_triton: bool
) -> str:
    """Return the backend for a GPU of this compute capability; None: for a CPU.

    torch's grouped product is one kernel from sm_90 on. Before that it is a loop which waits for the device
    (pytorch#186620); DeepSpeed's product in Triton was written for those GPUs.
    """
    can_group = dtype.itemsize == 2 and not cfg.d_model % 8 and not cfg.d_expert % 8
    if capability is None or not can_group or capability < (8, 0):
        return "sorted_loop"
    if capability >= (9, 0):
        return "torch_grouped"
    return "triton_grouped" if has_triton else "sorted_loop"


class Experts(nn.Module):
    """The n_local experts of this rank: weights gate_up [L, D, J] and down [L, D, F]."""

    def __init__(self, cfg: ModelConfig, n_local: int, backend: str) -> None:
        super().__init__()
        if backend not in EXPERT_BACKENDS:
            raise ValueError(
                f"expert backend {backend!r} does not exist; use one of {sorted(EXPERT_BACKENDS)}"
            )
        check_widths(backend, cfg.d_model, cfg.d_expert)
        self.backend = EXPERT_BACKENDS[backend]
        self.gate_up = nn.Parameter(torch.empty(n_local, cfg.d_model, 2 * cfg.d_expert))
        self.down = nn.Parameter(torch.empty(n_local, cfg.d_model, cfg.d_expert))

    def forward(self, rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor) -> Tensor:
        """Return each row's result times its weight, [R, D].

        rows_RD [R, D] sorted by expert, weights_R [R], counts_L [L] int64 with sum R; R = 0 is legal.
        """
        return self.backend.apply(rows_RD, weights_R, counts_L, self.gate_up, self.down)
