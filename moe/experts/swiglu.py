"""SwiGLU (Shazeer 2020) with the routing weight in it, forward and backward, for backends without autograd.

A row's weight multiplies its hidden activations, not its result. So the gradient of the weight needs only
what the backward pass computes anyway, and results need not be kept.

Shapes
  R rows   F d_expert   J 2 * d_expert: products with gate, then with up
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """The forward and the backward pass.

    forward: from (products_RJ, weights_R) to hidden_RF = silu(gates) * ups, each row times its weight
    backward: from (d_hidden_RF, products_RJ, weights_R) to hidden_RF and the gradients of products and
    weights; it overwrites d_hidden_RF, the gradient of hidden_RF
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _forward(products_RJ: Tensor, weights_R: Tensor) -> Tensor:
    gates_RF, ups_RF = products_RJ.chunk(2, dim=1)
    hidden_RF = F.silu(gates_RF)
    hidden_RF *= ups_RF
    hidden_RF *= weights_R.to(hidden_RF.dtype).unsqueeze(1)
    return hidden_RF


def _backward(d_hidden_RF: Tensor, products_RJ: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates_RF, ups_RF = products_RJ.chunk(2, dim=1)
    scale_R1 = weights_R.to(products_RJ.dtype).unsqueeze(1)
    silu_RF = F.silu(gates_RF)
    hidden_RF = silu_RF * ups_RF
    d_weights_R = (d_hidden_RF * hidden_RF).sum(1, dtype=weights_R.dtype)
    hidden_RF *= scale_R1
    d_hidden_RF *= scale_R1
    d_products_RJ = torch.empty_like(products_RJ)
    d_gates_RF, d_ups_RF = d_products_RJ.chunk(2, dim=1)
    torch.mul(silu_RF, d_hidden_RF, out=d_ups_RF)
    torch.ops.aten.silu_backward.grad_input(d_hidden_RF.mul_(ups_RF), gates_RF, grad_input=d_gates_RF)
    return hidden_RF, d_products_RJ, d_weights_R


plain_swiglu = Activation(_forward, _backward)


def _fused_forward(products_RJ: Tensor, weights_R: Tensor) -> Tensor:
    gates_RF, ups_RF = products_RJ.to(weights_R.dtype).chunk(2, dim=1)
    return (F.silu(gates_RF) * ups_RF * weights_R.unsqueeze(1)).to(products_RJ.dtype)


def _fused_backward(
    d_hidden_RF: Tensor, products_RJ: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide, scale_R1 = products_RJ.dtype, weights_R.dtype, weights_R.unsqueeze(1)
    gates_RF, ups_RF = products_RJ.to(wide).chunk(2, dim=1)
    d_hidden_RF = d_hidden_RF.to(wide)
    sigmoid_RF = gates_RF.sigmoid()
    silu_RF = gates_RF * sigmoid_RF
    unscaled_RF = silu_RF * ups_RF
    d_weights_R = (d_hidden_RF * unscaled_RF).sum(1)
    d_unscaled_RF = d_hidden_RF * scale_R1
    d_gates_RF = d_unscaled_RF * ups_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    d_products_RJ = torch.cat([d_gates_RF.to(dtype), (d_unscaled_RF * silu_RF).to(dtype)], dim=1)
    return (unscaled_RF * scale_R1).to(dtype), d_products_RJ, d_weights_R


@cache
def compiled_swiglu() -> Activation:
    """Return the same, but fused: each pass reads memory once. One graph serves any number of rows."""
    forward = torch.compile(_fused_forward, fullgraph=True)
    backward = torch.compile(_fused_backward, fullgraph=True)

    def run_forward(products_RJ: Tensor, weights_R: Tensor) -> Tensor:
        return forward(*_mark_rows_dynamic(products_RJ, weights_R))

    def run_backward(
        d_hidden_RF: Tensor, products_RJ: Tensor, weights_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*_mark_rows_dynamic(d_hidden_RF, products_RJ, weights_R))

    return Activation(run_forward, run_backward)


def _mark_rows_dynamic(*tensors: Tensor) -> tuple[Tensor, ...]:
    if tensors[0].size(0) > 1:  # torch.compile always gives one row a graph of its own
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
    return tensors
