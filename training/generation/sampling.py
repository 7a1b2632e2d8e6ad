"""Sample the next token from logits.

All tokens are sampled here: those of the samples during training, of `turnout generate` and of lm-eval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is sampled. The filters apply in this order, each to the tokens that the one before kept.

    temperature  0 takes the most likely token, without randomness
    top_k        keeps the k most likely tokens
    top_p        keeps the smallest set whose probabilities reach it (Holtzman et al. 2020, section 3.1)
    min_p        keeps tokens at least min_p times as likely as the most likely one
                 (Nguyen et al. 2024, 2407.01082)
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


def sample_tokens(logits: Tensor, how: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample one token id per row of logits [B, V] on the CPU, and return them as [B] int64.

    Of equal logits the lower id ranks first. generators: one per row, so that a row's token does not depend
    on the other rows, or one for all.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / how.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if how.top_k is not None:
        probs = probs[:, : how.top_k] / probs[:, : how.top_k].sum(-1, keepdim=True)
    if how.top_p is not None:
        mass_before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(mass_before >= how.top_p, 0.0)
    if how.min_p is not None:
        probs = probs.masked_fill(probs < how.min_p * probs[:, :1], 0.0)
    if len(generators) == 1:
        picked = torch.multinomial(probs, 1, generator=generators[0])
    else:
        rows = zip(probs.split(1), generators, strict=True)
        picked = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    return ids.gather(-1, picked).squeeze(-1)
