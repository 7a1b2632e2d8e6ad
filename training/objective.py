"""The training objective, as sums over the tokens of one micro-batch; training/step.py divides by tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnout.data.loader import IGNORE_INDEX, Batch
from turnout.moe.load_balancing import RouterState, RouterStats
from turnout.moe.model import Decoder
from turnout.moe.parallel.tensor_parallel import TensorParallel
from turnout.training.linear_cross_entropy import linear_cross_entropy, score_logits


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums over the unmasked tokens of one micro-batch.

    total  [] with gradient: cross-entropy plus the weighted balancing terms
    nll    [] nats, the cross-entropy alone, detached
    stats  per expert layer, stacked
    """

    total: Tensor
    nll: Tensor
    stats: RouterStats


class Objective(nn.Module):
    """The decoder with its loss: the module that the engine trains."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: Batch, router_state: RouterState) -> ObjectiveSums:
        """batch: tokens, targets, doc_ids [B, S]; all sums leave out tokens whose target is IGNORE_INDEX."""
        balance = self.decoder.cfg.balance
        is_counted = batch.targets != IGNORE_INDEX
        hidden, stats = self.decoder(batch.tokens, batch.doc_ids, is_counted, router_state)
        decoder, targets = self.decoder, batch.targets.flatten()
        nll = linear_cross_entropy(
            hidden.flatten(0, 1), decoder.head_weight, targets, decoder.tp, compiles=decoder.is_compiled
        )
        total = nll + balance.coef * stats.balance_sum.mean() + balance.z_coef * stats.z_sum.mean()
        return ObjectiveSums(total, nll.detach(), stats)


def token_nll(logits: Tensor, targets: Tensor, tp: TensorParallel) -> Tensor:
    """Return -log p(target) in nats, [B * S] fp32 or wider; 0 where the target is IGNORE_INDEX.

    logits [B, S, V / tp.size]: this rank's part of the vocabulary; targets [B, S].
    """
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return score_logits(logits, targets.flatten(), tp)[0]
