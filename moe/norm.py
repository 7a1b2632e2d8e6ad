"""RMSNorm (Zhang and Sennrich 2019) whose weight may serve a part of the tokens or heads only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.tensor_parallel import TensorParallel


class Norm(nn.Module):
    """is_partial: each rank norms a part of what the group holds, so the weight's gradients are summed."""

    def __init__(self, width: int, eps: float, tp: TensorParallel, *, is_partial: bool) -> None:
        super().__init__()
        self.eps, self.tp, self.is_partial = eps, tp, is_partial
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tp.shared(self.weight) if self.is_partial else self.weight
        return F.rms_norm(x, weight.shape, weight, self.eps)
