"""The dense feed-forward layer: SwiGLU (Shazeer 2020). Also the form of the shared experts."""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.recompute import Recompute, recompute_if
from moe.tensor_parallel import TensorParallel


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases; split over tensor-parallel ranks by its inner width."""

    def __init__(self, d_model: int, width: int, tp: TensorParallel, recompute: Recompute) -> None:
        super().__init__()
        self.tp, self.recomputes = tp, recompute == "selective"
        self.gate = nn.Linear(d_model, width // tp.size, bias=False)
        self.up = nn.Linear(d_model, width // tp.size, bias=False)
        self.down = nn.Linear(width // tp.size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.leave(recompute_if(self.recomputes, self._partial, self.tp.enter(x)))

    def _partial(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
