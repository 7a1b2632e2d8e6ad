"""SwiGLU (Shazeer 2020) with the routing weight in it, forwards and backwards, for kernels that do their own.

The weight of a row multiplies its hidden activations, and not its result: then the gradient of the weight
needs nothing that the backward pass does not have anyway, and results need not be kept.

Shapes
  R rows   F d_expert
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """forward: (gates_RF, ups_RF, weights_R) to silu(gates) * ups, each row times its weight.

    backward: (d_hidden_RF, gates_RF, ups_RF, weights_R) to what forward returned, and the gradients of gates,
    ups and weights. d_hidden_RF is the gradient of what forward returned, and is used up.
    """

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def _forward(gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor) -> Tensor:
    hidden_RF = F.silu(gates_RF)
    hidden_RF *= ups_RF
    hidden_RF *= weights_R.to(hidden_RF.dtype).unsqueeze(1)
    return hidden_RF


def _backward(
    d_hidden_RF: Tensor, gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale_R1 = weights_R.to(gates_RF.dtype).unsqueeze(1)
    silu_RF = F.silu(gates_RF)
    hidden_RF = silu_RF * ups_RF
    d_weights_R = (d_hidden_RF * hidden_RF).sum(1, dtype=weights_R.dtype)
    hidden_RF *= scale_R1
    d_hidden_RF *= scale_R1
    d_ups_RF = silu_RF.mul_(d_hidden_RF)
    d_gates_RF = torch.ops.aten.silu_backward(d_hidden_RF.mul_(ups_RF), gates_RF)
    return hidden_RF, d_gates_RF, d_ups_RF, d_weights_R


plain_swiglu = Activation(_forward, _backward)


def _fused_forward(gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor) -> Tensor:
    wide = weights_R.dtype
    return (F.silu(gates_RF.to(wide)) * ups_RF.to(wide) * weights_R.unsqueeze(1)).to(gates_RF.dtype)


def _fused_backward(
    d_hidden_RF: Tensor, gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, wide, scale_R1 = gates_RF.dtype, weights_R.dtype, weights_R.unsqueeze(1)
    gates_RF, ups_RF, d_hidden_RF = (x.to(wide) for x in (gates_RF, ups_RF, d_hidden_RF))
    sigmoid_RF = gates_RF.sigmoid()
    silu_RF = gates_RF * sigmoid_RF
    unscaled_RF = silu_RF * ups_RF
    d_weights_R = (d_hidden_RF * unscaled_RF).sum(1)
    d_unscaled_RF = d_hidden_RF * scale_R1
    d_gates_RF = d_unscaled_RF * ups_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    results = (unscaled_RF * scale_R1, d_gates_RF, d_unscaled_RF * silu_RF)
    hidden_RF, d_gates_RF, d_ups_RF = (x.to(dtype) for x in results)
    return hidden_RF, d_gates_RF, d_ups_RF, d_weights_R


@cache
def compiled_swiglu() -> Activation:
    """Return the same, each direction one pass over memory. Any number of rows is the same graph."""
    forward = torch.compile(_fused_forward, fullgraph=True)
    backward = torch.compile(_fused_backward, fullgraph=True)

    def run_forward(gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor) -> Tensor:
        return forward(*_of_any_length(gates_RF, ups_RF, weights_R))

    def run_backward(
        d_hidden_RF: Tensor, gates_RF: Tensor, ups_RF: Tensor, weights_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(*_of_any_length(d_hidden_RF, gates_RF, ups_RF, weights_R))

    return Activation(run_forward, run_backward)


def _of_any_length(*tensors: Tensor) -> tuple[Tensor, ...]:
    if tensors[0].size(0) > 1:  # one row has a graph of its own, as torch.compile has it
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
    return tensors
