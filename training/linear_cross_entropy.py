"""The head and its cross-entropy, computed in chunks of tokens so that the logits are never stored whole.

All logits together, [T, V], would be by far the largest tensor of a step. Each chunk's gradients are computed
right after its loss, while its logits still exist; only the gradients are kept. Softmax and sums are in fp32
or wider.

Shapes
  T tokens   D d_model   V vocab_size / tp.size: this rank's part of the vocabulary
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.data.loader import IGNORE_INDEX
from turnout.moe.parallel.tensor_parallel import TensorParallel

# Size of a chunk's logits, in fp32, or in their own dtype if the loss is compiled. Smaller chunks add to the
# gradient of the whole head more often.
CHUNK_BYTES = 128 << 20


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, tp: TensorParallel, *, compiles: bool = False
) -> Tensor:
    """Return the sum of -log p(target) in nats, [] fp32 or wider, without targets that are IGNORE_INDEX.

    Logits are hidden_TD @ weight_VD.T. Under tensor parallelism they are not gathered (Shoeybi et al. 2019,
    1909.08053, section 3), and hidden_TD is the same on every rank; its gradient is this rank's part.
    compiles: let torch.compile fuse the operations on logits; no effect under tensor parallelism.
    """
    has_grad, is_compiled = torch.is_grad_enabled(), compiles and tp.size == 1
    nll: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        hidden_TD, weight_VD, targets_T, tp, has_grad, is_compiled
    )
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        tp: TensorParallel,
        has_backward: bool,
        compiles: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = hidden_TD.new_zeros((), dtype=wide)
        d_hidden_TD, d_weight_DV = torch.empty_like(hidden_TD), None
        if has_backward:
            # Transposed, because oneDNN is slow if the left matrix is transposed; that would be the large
            # one.
            d_weight_DV = torch.zeros_like(weight_VD.t(), dtype=wide, memory_format=torch.contiguous_format)
        # Compiled, logits are never stored in fp32.
        n_bytes = weight_VD.size(0) * (hidden_TD.dtype.itemsize if compiles else wide.itemsize)
        n_at_once = max(1, CHUNK_BYTES // n_bytes)
        for start in range(0, hidden_TD.size(0), n_at_once):
            here = slice(start, start + n_at_once)
            logits, targets = F.linear(hidden_TD[here], weight_VD), targets_T[here]
            if d_weight_DV is None:
                total += score_logits(logits.to(wide), targets, tp)[0].sum()
                continue
            nll, d_logits = _fused()(logits, targets) if compiles else _differentiate(logits, targets, tp)
            total += nll
            d_hidden_TD[here] = d_logits @ weight_VD
            d_weight_DV += hidden_TD[here].t().contiguous() @ d_logits
        if d_weight_DV is not None:
            ctx.save_for_backward(d_hidden_TD, d_weight_DV)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        d_hidden_TD, d_weight_DV = ctx.saved_tensors
        # In place: nothing else holds these tensors, and there is only one backward pass.
        d_weight_VD = d_weight_DV.mul_(grads[0]).to(ctx.weight_dtype).t().contiguous()
        return d_hidden_TD.mul_(grads[0]), d_weight_VD, None, None, None, None


def score_logits(logits: Tensor, targets: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return -log p(target) [T], 0 for ignored targets, and this rank's log-probabilities [T, V].

    logits [T, V] fp32 or wider; targets [T]. Logits are not gathered: ranks exchange three values per token.
    """
    local, is_here = _local_targets(targets, logits.size(1), tp)
    if tp.size == 1:
        logprobs = logits.log_softmax(-1)
        return -logprobs.gather(1, local).squeeze(1) * is_here, logprobs
    largest = tp.max(logits.amax(1))
    normaliser = tp.sum((logits - largest.unsqueeze(1)).exp_().sum(1)).log() + largest
    logprobs = logits - normaliser.unsqueeze(1)
    return -tp.sum(logprobs.gather(1, local).squeeze(1) * is_here), logprobs


def _differentiate(logits: Tensor, targets: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits [T, V], and its gradient: probabilities, minus 1 at the target."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    nll, logprobs = score_logits(logits.to(wide), targets, tp)
    local, is_here = _local_targets(targets, logprobs.size(1), tp)
    grads = logprobs.exp_()
    grads.scatter_add_(1, local, -is_here.to(wide).unsqueeze(1))
    grads.mul_((targets != IGNORE_INDEX).to(wide).unsqueeze(1))
    return nll.sum(), grads.to(logits.dtype)


def _differentiate_fused(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for an unsplit vocabulary, in a form that torch.compile fuses to two passes over logits."""
    wide_TV = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser_T1 = wide_TV.logsumexp(1, keepdim=True)
    is_counted_T1 = (targets != IGNORE_INDEX).unsqueeze(1)
    target_T1 = targets.unsqueeze(1).where(is_counted_T1, 0)
    log_probs_T1 = wide_TV.gather(1, target_T1) - normaliser_T1
    grads_TV = ((wide_TV - normaliser_T1).exp() * is_counted_T1).to(logits.dtype)
    # Overwritten: comparing each column with the target took a quarter of the kernel's time.
    grads_TV.scatter_(1, target_T1, ((log_probs_T1.exp() - 1) * is_counted_T1).to(logits.dtype))
    return (-log_probs_T1 * is_counted_T1).sum(), grads_TV


@cache
def _fused() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    # For any number of tokens: the last chunk has fewer.
    return torch.compile(_differentiate_fused, fullgraph=True, dynamic=True)


def _local_targets(targets: Tensor, local_vocab_size: int, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return [T, 1] each target's index in this rank's part of the vocabulary, 0 if it is elsewhere, and [T]
    whether it is here.
    """
    local = targets - tp.rank * local_vocab_size
    is_here = (targets != IGNORE_INDEX) & (local >= 0) & (local < local_vocab_size)
    return local.where(is_here, 0).unsqueeze(1), is_here
