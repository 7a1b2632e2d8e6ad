"""Score windows of text with the model: -log p of each token, and whether it was the most likely one.

A sequence holds one window, or several short ones packed as separate documents, which cannot attend to each
other. Gradients are recorded unless the caller disables them.
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

# Short windows are packed together within this many micro-batches, so results arrive that much later.
PACKED_BATCHES = 32


@dataclass(frozen=True)
class WindowScores:
    """Sums over the counted targets of each window, [n] on the CPU.

    nll        fp64, nats
    n_tokens   int64
    is_greedy  bool: each counted target is the most likely token; of equal ones the lower id counts
    """

    nll: Tensor
    n_tokens: Tensor
    is_greedy: Tensor


def to_tensors(sequences: Sequence[Sequence[Window]], seq_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, targets, doc_ids and is_token (False for padding), each [n, S], of packed sequences.

    Without sequences the result is one of padding, because all ranks must call the model equally often.
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
            # Padding belongs to the document before it, so that a single window needs no mask.
            doc_ids[i, start:] = number
            start = here.stop
    return tokens, targets, doc_ids, is_token


def sequence_logits(
    decoder: Decoder, sequences: Sequence[Sequence[Window]], state: RouterState, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return logits [n, S, V / tp.size] and targets [n, S] of packed sequences."""
    tokens, targets, doc_ids, is_token = to_tensors(sequences, decoder.cfg.seq_len)
    # Every token counts, scored or only read: which rows a capacity factor drops must not depend on scoring.
    hidden, _ = decoder(tokens.to(device), doc_ids, is_token.to(device), state)
    targets = targets.to(device)
    return decoder.logits(hidden), targets


@torch.no_grad()
def score_windows(
    decoder: Decoder, windows: Sequence[Window], state: RouterState, *, microbatch_seqs: int
) -> WindowScores:
    """Score each window in one process. The result does not depend on which windows are packed together."""
    device, n_windows = decoder.embed.weight.device, len(windows)
    nll = torch.zeros(n_windows, dtype=torch.float64)
    n_tokens, n_missed = torch.zeros(n_windows, dtype=torch.int64), torch.zeros(n_windows, dtype=torch.int64)
    sequences = pack_windows(windows, decoder.cfg)
    for start in range(0, len(sequences), microbatch_seqs):
        batch = sequences[start : start + microbatch_seqs]
        logits, targets = sequence_logits(
            decoder, [[windows[i] for i in row] for row in batch], state, device
        )
        is_counted = (targets != IGNORE_INDEX).flatten()
        window_idx = torch.from_numpy(target_windows(batch, windows))
        counted_nll = token_nll(logits, targets, decoder.tp)[is_counted].double().cpu()
        is_missed = (logits.argmax(-1) != targets).flatten()[is_counted].long().cpu()
        nll.index_add_(0, window_idx, counted_nll)
        n_tokens.index_add_(0, window_idx, torch.ones_like(window_idx))
        n_missed.index_add_(0, window_idx, is_missed)
    return WindowScores(nll, n_tokens, n_missed == 0)


def pack_windows(windows: Sequence[Window], cfg: ModelConfig) -> list[list[int]]:
    """Pack windows into few sequences of their indices: the longest one left, then the shortest that fit.

    With a capacity factor each window gets its own sequence, because an expert's capacity is per sequence.
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


def target_windows(sequences: Sequence[Sequence[int]], windows: Sequence[Window]) -> np.ndarray:
    """Return the index of the window of each counted target, int64, in the order of the sequences."""
    order = np.asarray([i for row in sequences for i in row], dtype=np.int64)
    return np.repeat(order, [np.count_nonzero(windows[i].targets != IGNORE_INDEX) for i in order])
