"""All experts by DeepSpeed's grouped matrix product in Triton, for GPUs before sm_90, where torch's grouped
product is a loop that waits for the device.

DeepSpeed trains nothing here: this file uses one operator of it, and no other file of moe/ imports it.

Shapes
  R rows on this rank   D d_model   F d_expert   J 2 * d_expert: gate, then up   L experts on this rank
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.moe.experts.requirements import check_element_count


def triton_grouped_experts(
    rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, gate_up_LDJ: Tensor, down_LDF: Tensor
) -> Tensor:
    """Apply all experts, in bf16 or fp16, with sums in fp32. No device sync.

    Raises ValueError for fp32 on a GPU, which would silently multiply as TF32, with 11 significant bits, and
    for matrices that int32 cannot index.
    """
    if rows_RD.is_cuda and rows_RD.dtype.itemsize != 2:
        raise ValueError(
            f"expert backend 'triton_grouped' computes in bf16 or fp16, but these rows are {rows_RD.dtype}; "
            "use backend 'sorted_loop', or half precision"
        )
    n_rows, d_model, inner = rows_RD.size(0), *gate_up_LDJ.shape[1:]
    check_element_count(
        "triton_grouped", rows=(n_rows, max(d_model, inner)), weights=tuple(gate_up_LDJ.shape)
    )
    multiply, offsets_L = _grouped_product(), counts_L.cumsum(0).to(torch.int32)
    gates_RF, ups_RF = multiply(rows_RD, gate_up_LDJ, offsets_L, trans_b=False).chunk(2, dim=1)
    hidden_RF = F.silu(gates_RF) * ups_RF * weights_R.to(rows_RD.dtype).unsqueeze(1)
    return multiply(hidden_RF, down_LDF, offsets_L, trans_b=True)


@cache
def _grouped_product() -> Callable[..., Tensor]:
    # Imported here because it takes seconds and needs Triton, which only GPUs have.
    from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton

    multiply: Callable[..., Tensor] = group_gemm_triton
    return multiply
