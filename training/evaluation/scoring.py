"""How likely the model finds the tokens of windows: the one place where held-out text meets the model.

A sequence holds one window, or several short ones one after the other as documents, which cannot see each
other. No gradient is kept where the caller keeps none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turnout.data.loader import IGNORE_INDEX
from turnout.data.windows import Window
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.objective import token_nll

# Short windows find company among the windows of so many micro-batches; answers come as late as that.
ARRANGED_BATCHES = 32


@dataclass(frozen=True)
class WindowScores:
    """Of each window, [n] on the CPU, its counted targets only.

    nll        fp64, nats
    n_tokens   int64
    is_greedy  bool: each of them is the most likely token, equals broken towards the lower id
    """

    nll: Tensor
    n_tokens: Tensor
    is_greedy: Tensor


def lay_out(sequences: Sequence[Sequence[Window]], seq_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, targets, doc_ids and which tokens are there [n, S], of sequences of one or more windows.

    Without sequences there is an empty one, because ranks must call the model equally often.
    """
    shape = (max(1, len(sequences)), seq_len)
    tokens, doc_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    targets, is_token = torch.full(shape, IGNORE_INDEX), torch.zeros(shape, dtype=torch.bool)
    for i, windows in enumerate(sequences):
        start = 0
        for number, window in enumerate(windows):
            here = slice(start, start + len(window.inputs))
            tokens[i, here] = torch.as_tensor(window.inputs)
            targets[i, here], is_token[i, here] = torch.as_tensor(window.targets), True
            # Padding is of the last document, which it follows, so that one window needs no mask.
            doc_ids[i, start:] = number
            start = here.stop
    return tokens, targets, doc_ids, is_token


def sequence_logits(
    decoder: Decoder, sequences: Sequence[Sequence[Window]], state: RouterState, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return logits [n, S, V / tp.size] and targets [n, S] of sequences, each of one or more windows."""
    tokens, targets, doc_ids, is_token = lay_out(sequences, decoder.cfg.seq_len)
    # Every token counts, scored or only read: what a capacity drops must not depend on what is scored.
    hidden, _ = decoder(tokens.to(device), doc_ids, is_token.to(device), state)
    targets = targets.to(device)
    return decoder.logits(hidden), targets


@torch.no_grad()
def score_windows(
    decoder: Decoder, windows: Sequence[Window], state: RouterState, *, microbatch_seqs: int
) -> WindowScores:
    """Score each window, in one process, as if it were alone."""
    device, n_windows = decoder.embed.weight.device, len(windows)
    nll = torch.zeros(n_windows, dtype=torch.float64)
    n_tokens, n_missed = torch.zeros(n_windows, dtype=torch.int64), torch.zeros(n_windows, dtype=torch.int64)
    sequences = arrange(windows, decoder.cfg)
    for start in range(0, len(sequences), microbatch_seqs):
        batch = sequences[start : start + microbatch_seqs]
        logits, targets = sequence_logits(
            decoder, [[windows[i] for i in row] for row in batch], state, device
        )
        is_counted = (targets != IGNORE_INDEX).flatten()
        owners = torch.from_numpy(owners_of(batch, windows))
        counted_nll = token_nll(logits, targets, decoder.tp)[is_counted].double().cpu()
        is_missed = (logits.argmax(-1) != targets).flatten()[is_counted].long().cpu()
        nll.index_add_(0, owners, counted_nll)
        n_tokens.index_add_(0, owners, torch.ones_like(owners))
        n_missed.index_add_(0, owners, is_missed)
    return WindowScores(nll, n_tokens, n_missed == 0)


def arrange(windows: Sequence[Window], cfg: ModelConfig) -> list[list[int]]:
    """Put the windows, by index, into few sequences: the longest left, then the shortest left while they fit.

    An expert's capacity is of a sequence, so with one each window is alone.
    """
    lengths = [len(window.inputs) for window in windows]
    order = sorted(range(len(windows)), key=lengths.__getitem__)
    sequences: list[list[int]] = []
    shortest = 0
    while shortest < len(order):
        row = [order.pop()]
        room = cfg.seq_len - lengths[row[0]]
        while cfg.router.capacity_factor is None and shortest < len(order):
            room -= lengths[order[shortest]]
            if room < 0:
                break
            row.append(order[shortest])
            shortest += 1
        sequences.append(row)
    return sequences


def owners_of(sequences: Sequence[Sequence[int]], windows: Sequence[Window]) -> np.ndarray:
    """Return which window each counted target is of, in the order of the sequences, int64."""
    order = np.asarray([i for row in sequences for i in row], dtype=np.int64)
    return np.repeat(order, [np.count_nonzero(windows[i].targets != IGNORE_INDEX) for i in order])
