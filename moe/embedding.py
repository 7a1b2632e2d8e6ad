"""The token embedding, split over the vocabulary.

Shapes
  T tokens   D d_model   V vocab_size
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.tensor_parallel import TensorParallel


class Embedding(nn.Module):
    """weight [V / tp.size, D]: the rows of consecutive token ids."""

    def __init__(self, vocab_size: int, d_model: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(vocab_size // tp.size, d_model))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Return [T, D], or this rank's tokens of it under sequence parallelism."""
        if self.tp.size == 1:
            return F.embedding(tokens_T, self.weight)
        n_local = self.weight.size(0)
        local_T = tokens_T - self.tp.rank * n_local
        is_here_T = (local_T >= 0) & (local_T < n_local)
        rows_TD = F.embedding(local_T.where(is_here_T, 0), self.weight)
        return self.tp.leave(rows_TD * is_here_T.unsqueeze(1))
