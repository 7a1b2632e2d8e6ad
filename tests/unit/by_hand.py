"""The loss of one document, written out."""

import torch

from moe.balance import RouterState
from moe.model import Decoder


@torch.no_grad()
def nll_by_hand(decoder: Decoder, state: RouterState, ids: list[int], bos_id: int) -> float:
    """Score one document window by window, one sequence at a time, with a plain log-softmax."""
    stream, total, seq_len = [bos_id, *ids], 0.0, decoder.cfg.seq_len
    for first in range(0, len(ids), seq_len):
        end = min(first + seq_len, len(ids))
        begin = max(0, end - seq_len)
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
        tokens[0, : end - begin] = torch.tensor(stream[begin:end])
        is_counted = torch.arange(seq_len)[None] < end - begin
        hidden, _ = decoder(tokens, torch.zeros_like(tokens), is_counted, state)
        logprobs = decoder.logits(hidden)[0].double().log_softmax(-1)
        total -= sum(float(logprobs[i - begin, stream[i + 1]]) for i in range(first, end))
    return total
