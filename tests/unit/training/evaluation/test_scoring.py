"""Scores of windows, compared with a plain log-softmax of each window alone."""

import numpy as np
import pytest
import torch

from tests.models import random_state, tiny_config, tiny_decoder
from turnout.data.loader import IGNORE_INDEX
from turnout.data.windows import Window
from turnout.training.evaluation.scoring import score_windows

CFG = tiny_config(seq_len=20)
BIAS = 0.3


@torch.no_grad()
def logits_of(inputs: list[int]) -> torch.Tensor:
    """Return the logits after each token of one sequence, [n, V]."""
    decoder = tiny_decoder(CFG)
    tokens = torch.tensor([inputs + [0] * (CFG.seq_len - len(inputs))])
    is_counted = torch.arange(CFG.seq_len)[None] < len(inputs)
    hidden, _ = decoder(tokens, torch.zeros_like(tokens), is_counted, random_state(CFG, bias=BIAS))
    return decoder.logits(hidden)[0, : len(inputs)]


def test_a_window_is_greedy_where_each_counted_token_is_the_likeliest() -> None:
    inputs = [3, 1, 4, 1, 5, 9]
    logits = logits_of(inputs)
    likeliest = logits.argmax(-1).numpy()

    def window(*, wrong: tuple[int, ...] = (), ignored: tuple[int, ...] = ()) -> Window:
        targets = likeliest.copy()
        targets[list(wrong)] = (targets[list(wrong)] + 1) % CFG.vocab_size
        targets[list(ignored)] = IGNORE_INDEX
        return Window(np.asarray(inputs), targets)

    windows = [
        window(),
        window(wrong=(2,)),
        window(wrong=(5,), ignored=(0, 1, 2)),
        window(ignored=(0, 1, 2)),
        window(wrong=(0, 1, 2, 3, 4, 5)),
    ]
    scores = score_windows(tiny_decoder(CFG), windows, random_state(CFG, bias=BIAS), microbatch_seqs=1)
    assert scores.is_greedy.tolist() == [True, False, False, True, False]
    assert scores.n_tokens.tolist() == [6, 6, 3, 3, 6]
    logprobs = logits.log_softmax(-1)
    for i, one in enumerate(windows):
        counted = [(t, int(target)) for t, target in enumerate(one.targets) if target != IGNORE_INDEX]
        want = -sum(float(logprobs[t, target]) for t, target in counted)
        assert float(scores.nll[i]) == pytest.approx(want, rel=1e-9)
