"""Dense layers: SwiGLU (Shazeer 2020), also for the shared experts, and norm and embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.moe.parallel.tensor_parallel import TensorParallel
from turnout.moe.recompute import Recompute, recompute_if


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases; its inner width is split over tensor-parallel ranks."""

    def __init__(self, d_model: int, width: int, tp: TensorParallel, recompute: Recompute) -> None:
        super().__init__()
        self.tp, self.recomputes = tp, recompute == "selective"
        self.gate = nn.Linear(d_model, width // tp.size, bias=False)
        self.up = nn.Linear(d_model, width // tp.size, bias=False)
        self.down = nn.Linear(width // tp.size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [T, D] of x [T, D]; under sequence parallelism both hold this rank's tokens only."""
        return self.tp.leave(recompute_if(self.recomputes, self._partial, self.tp.enter(x)))

    def _partial(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019).

    is_partial: each rank normalises only a part of the group's tokens or heads, so the weight's gradients are
    summed over ranks
    """

    def __init__(self, width: int, eps: float, tp: TensorParallel, *, is_partial: bool) -> None:
        super().__init__()
        self.eps, self.tp, self.is_partial = eps, tp, is_partial
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., width], normalised over its last dim."""
        weight = self.tp.shared(self.weight) if self.is_partial else self.weight
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Embedding(nn.Module):
    """weight [V / tp.size, D]: the rows of consecutive token ids."""

    def __init__(self, vocab_size: int, d_model: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(vocab_size // tp.size, d_model))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Return [T, D], or only this rank's tokens of it under sequence parallelism."""
        if self.tp.size == 1:
            return F.embedding(tokens_T, self.weight)
        n_local = self.weight.size(0)
        local_T = tokens_T - self.tp.rank * n_local
        is_here_T = (local_T >= 0) & (local_T < n_local)
        rows_TD = F.embedding(local_T.where(is_here_T, 0), self.weight)
        return self.tp.leave(rows_TD * is_here_T.unsqueeze(1))
