"""SwiGLU (Shazeer 2020) with the routing weight in it, forwards and backwards, for kernels that do their own.

The weight of a row multiplies its hidden activations, and not its result: then the gradient of the weight
needs nothing that the backward pass does not have anyway, and results need not be kept.

Shapes
  R rows   F d_expert
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_swiglu(gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Return silu(gates) * ups, each row times its weight."""
    hidden_RF = F.silu(gates_RF)
    hidden_RF *= ups_RF
    hidden_RF *= weights_R.to(hidden_RF.dtype).unsqueeze(1)
    return hidden_RF


def swiglu_backward(
    d_hidden_RF: Tensor, gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weighted_swiglu once more, and the gradients of gates, ups and weights.

    d_hidden_RF: the gradient of what weighted_swiglu returns. It is overwritten.
    """
    scale_R1 = weights_R.to(gates_RF.dtype).unsqueeze(1)
    silu_RF = F.silu(gates_RF)
    hidden_RF = silu_RF * ups_RF
    d_weights_R = (d_hidden_RF * hidden_RF).sum(1, dtype=weights_R.dtype)
    hidden_RF *= scale_R1
    d_hidden_RF *= scale_R1
    d_ups_RF = silu_RF.mul_(d_hidden_RF)
    d_gates_RF = torch.ops.aten.silu_backward(d_hidden_RF.mul_(ups_RF), gates_RF)
    return hidden_RF, d_gates_RF, d_ups_RF, d_weights_R
