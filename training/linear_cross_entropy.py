"""The loss of hidden states without their logits: head and cross-entropy of some tokens at a time.

Logits of V words for T tokens would be the largest tensor of a step by far. Of each chunk only its gradients
are kept, which are computed at once, while its logits are there. Softmax and sums are fp32 or wider.

Shapes
  T tokens   D d_model   V vocab_size / tp.size: this rank's part of the vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import IGNORE_INDEX
from moe.tensor_parallel import TensorParallel

# Of the logits of a chunk, in fp32. Smaller chunks add more often to the gradient of the whole head.
CHUNK_BYTES = 96 << 20


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, tp: TensorParallel
) -> Tensor:
    """Return the sum of -log p(target) in nats, [] fp32 or wider; a target of IGNORE_INDEX counts nowhere.

    Logits are hidden_TD @ weight_VD.T. Under tensor parallelism they are not gathered (Shoeybi et al. 2019,
    1909.08053, section 3), and hidden_TD is the same on every rank; its gradient is this rank's part.
    """
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, tp, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        tp: TensorParallel,
        has_backward: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = hidden_TD.new_zeros((), dtype=wide)
        d_hidden_TD, d_weight_VD = torch.empty_like(hidden_TD), None
        if has_backward:
            d_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        n_at_once = max(1, CHUNK_BYTES // (weight_VD.size(0) * wide.itemsize))
        for start in range(0, hidden_TD.size(0), n_at_once):
            here = slice(start, start + n_at_once)
            nll, logprobs = score_logits(F.linear(hidden_TD[here], weight_VD).to(wide), targets_T[here], tp)
            total += nll.sum()
            if d_weight_VD is not None:
                d_logits = _differentiate(logprobs, targets_T[here], tp).to(hidden_TD.dtype)
                del logprobs
                d_hidden_TD[here] = d_logits @ weight_VD
                d_weight_VD += d_logits.t() @ hidden_TD[here]
        if d_weight_VD is not None:
            ctx.save_for_backward(d_hidden_TD, d_weight_VD)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        # In place: nobody else holds them, and there is one backward pass.
        d_weight_VD = d_weight_VD.mul_(grads[0]).to(ctx.weight_dtype)
        return d_hidden_TD.mul_(grads[0]), d_weight_VD, None, None, None


def score_logits(logits: Tensor, targets: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return -log p(target) of each token, and this rank's words' log-probabilities [T, V].

    logits [T, V] fp32 or wider. They are not gathered: three numbers per token travel.
    """
    local, is_here = _local_targets(targets, logits.size(1), tp)
    if tp.size == 1:
        logprobs = logits.log_softmax(-1)
        return -logprobs.gather(1, local).squeeze(1) * is_here, logprobs
    largest = tp.max(logits.amax(1))
    normaliser = tp.sum((logits - largest.unsqueeze(1)).exp_().sum(1)).log() + largest
    logprobs = logits - normaliser.unsqueeze(1)
    return -tp.sum(logprobs.gather(1, local).squeeze(1) * is_here), logprobs


def _differentiate(logprobs: Tensor, targets: Tensor, tp: TensorParallel) -> Tensor:
    """Return the gradient of the summed loss by the logits: probabilities, less 1 at the target."""
    local, is_here = _local_targets(targets, logprobs.size(1), tp)
    grads = logprobs.exp_()
    grads.scatter_add_(1, local, -is_here.to(grads.dtype).unsqueeze(1))
    return grads.mul_((targets != IGNORE_INDEX).to(grads.dtype).unsqueeze(1))


def _local_targets(targets: Tensor, n_words: int, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return [T, 1] which of this rank's words is the target, 0 where none is, and [T] whether one is."""
    local = targets - tp.rank * n_words
    is_here = (targets != IGNORE_INDEX) & (local >= 0) & (local < n_words)
    return local.where(is_here, 0).unsqueeze(1), is_here
