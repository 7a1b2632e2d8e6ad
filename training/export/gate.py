"""The gate of every export: the client loads what was written and must compute what our model computes.

Both sides run in fp32 with the numbers as they were stored, so rounding to bf16 or Q8_0 is no difference,
and the order of sums is all that remains. Unlike the writer the gate needs memory for the whole model in
fp32: ours first, and when that is gone the client's.

Where two experts of a token are within TIE of each other, rounding alone may choose the other one, and from
that token on nothing can be demanded: a row counts up to its first such token. Where too few count, other
rows are tried.

A sliding window of up to MAX_TRIED_WINDOW has to be seen to hide something, in a row longer than itself where
it is long. Before its end there is hardly ever no tie, so there some tokens must agree: by chance, with other
keys, none would. That a longer one was not tried is said.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from turnout.data.corpus import Corpus
from turnout.moe.config import ModelConfig
from turnout.moe.router import Router
from turnout.training.checkpoint.weights import Weights, load_decoder
from turnout.training.errors import ExportError

TOLERANCE = 1e-4  # of a logit, absolute
TIE = 1e-5  # of the largest score
N_TOKENS = 1024
ROW_TOKENS = 128  # many short rows: each is compared up to its first tie
MIN_COMPARED = 32
MIN_COMPARED_FRAC = 0.05
N_TRIES = 4  # of pseudo-random rows, where the first rows do not do
MAX_TRIED_WINDOW = 8192  # the logits of a longer row are many GB, of the client's too
MIN_PAST_WINDOW = 8
SEED = 20_240_229


@dataclass(frozen=True)
class HeldOut:
    """The rows of tokens on which an export is tried, each [length] int64, and what to call them."""

    rows: tuple[Tensor, ...]
    words: str


@dataclass(frozen=True)
class Expected:
    """What our model computes of some rows.

    logits     of each row [length, V] fp32
    is_clear   of each row [length] bool: no two experts were too close, here or before
    window     the model's
    """

    logits: tuple[Tensor, ...]
    is_clear: tuple[Tensor, ...]
    window: int | None


class _Shortened:
    """Weights of a decoder for shorter sequences: a position is turned the same in all of them."""

    def __init__(self, weights: Weights, seq_len: int) -> None:
        self.place, self.tokenizer_path = weights.place, weights.tokenizer_path
        self.cfg = weights.cfg.model_copy(update={"seq_len": seq_len})
        self.read, self.read_bias = weights.read, weights.read_bias


class Rounded:
    """Weights as a file of less precision holds them."""

    def __init__(self, weights: Weights, to_stored: Callable[[str, Tensor], Tensor]) -> None:
        self.place, self.cfg, self.tokenizer_path = weights.place, weights.cfg, weights.tokenizer_path
        self._weights, self._to_stored = weights, to_stored

    def read(self, name: str, expert: int | None = None) -> Tensor:
        return self._to_stored(name, self._weights.read(name, expert))

    def read_bias(self) -> Tensor:
        return self._weights.read_bias()


def random_tokens(cfg: ModelConfig, seed: int = SEED) -> HeldOut:
    """Return the same tokens for every model of a vocabulary, length and window."""
    lengths = row_lengths(cfg)
    tokens = torch.randint(cfg.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return HeldOut(tokens.split(lengths), "pseudo-random tokens")


def held_out_tokens(cfg: ModelConfig, corpus: Corpus) -> HeldOut | None:
    """Return text that no step has trained on; None where the corpus has too little of it."""
    lengths = row_lengths(cfg)
    for stream in corpus.split("valid"):
        if stream.n_tokens >= sum(lengths):
            tokens = torch.as_tensor(stream.read(0, sum(lengths)).astype("int64"))
            return HeldOut(tokens.split(lengths), f"held-out text of {corpus.path}")
    return None


def row_lengths(cfg: ModelConfig) -> list[int]:
    """Return the tokens of each row: short ones, and where a window has more, one that it slides over."""
    short = min(cfg.seq_len, ROW_TOKENS)
    lengths = [short] * -(-N_TOKENS // short)
    if cfg.sliding_window is not None and cfg.sliding_window <= MAX_TRIED_WINDOW:
        long = min(cfg.seq_len, cfg.sliding_window + max(64, cfg.sliding_window // 4))
        lengths += [long] if long > short else []
    return lengths


def shortage(expected: Expected) -> str | None:
    """Return why what can be compared proves too little; None where it is enough."""
    is_clear = torch.cat([row for row in expected.is_clear if len(row) <= ROW_TOKENS])
    n_compared, n_tokens = int(is_clear.sum()), is_clear.numel()
    n_needed = min(n_tokens, max(MIN_COMPARED, math.ceil(MIN_COMPARED_FRAC * n_tokens)))
    return None if n_compared >= n_needed else f"only {n_compared} of {n_tokens} where {n_needed} are needed"


@torch.no_grad()
def expected_logits(weights: Weights, rows: Sequence[Tensor]) -> Expected:
    """Return what our model makes of rows of tokens, each one document."""
    parts = []
    for length, equal in groupby(rows, len):  # rows of one length lie together, and share a decoder
        parts += _expected_of_equal(weights, length, list(equal))
    logits, is_clear = zip(*parts, strict=True)
    return Expected(logits, is_clear, weights.cfg.sliding_window)


def _expected_of_equal(weights: Weights, length: int, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return logits and is_clear of rows of one length. The decoder is gone before another is loaded."""
    decoder, state = load_decoder(_Shortened(weights, length))
    close, found = list[Tensor](), []

    def note(router: nn.Module, arguments: tuple, _: object) -> None:
        assert isinstance(router, Router)
        close.append(_is_close(router, *arguments[:2]))

    for module in decoder.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    for row in rows:
        close.clear()
        one = row.unsqueeze(0)
        hidden, _ = decoder(one, torch.zeros_like(one), torch.ones_like(one, dtype=torch.bool), state)
        found.append((decoder.logits(hidden)[0], torch.stack(close).any(0).cumsum(0) == 0))
    return found


def choose_rows(
    weights: Weights,
    first: HeldOut,
    compute: Callable[[Weights, Sequence[Tensor]], Expected] = expected_logits,
) -> tuple[HeldOut, Expected]:
    """Return the first rows of which enough can be compared, and what our model makes of them.

    Raises ExportError where neither those given nor pseudo-random ones do.
    """
    fault = None
    for number in range(N_TRIES + 1):
        tried = first if number == 0 else random_tokens(weights.cfg, SEED + number)
        expected = compute(weights, tried.rows)
        if (fault := shortage(expected)) is None:
            return tried, expected
    raise ExportError(
        f"too few tokens can be compared, of {N_TRIES + 1} sets of rows: {fault}. Some router scores two "
        f"experts within {TIE:g} of each other, and from there on either may be chosen; nothing was kept"
    )


def _is_close(router: Router, x_TD: Tensor, bias_E: Tensor) -> Tensor:
    """Return where the last chosen and the first expert left out have nearly the same score, [T] bool."""
    logits_TE = nn.functional.linear(x_TD, router.weight)
    scores_TE = logits_TE.softmax(-1) if router.cfg.router.score == "softmax" else logits_TE.sigmoid()
    best = (scores_TE + bias_E).sort(-1, descending=True).values
    k = router.cfg.top_k
    if k == router.cfg.n_experts:
        return torch.zeros(len(x_TD), dtype=torch.bool)
    return best[:, k - 1] - best[:, k] <= TIE * scores_TE.max(-1).values


def check_logits(found: Sequence[Tensor], expected: Expected, *, client: str, held_out: HeldOut) -> str:
    """Return in words how close the client's logits, of each row [length, V], are. Raises ExportError."""
    differences = [
        (theirs[:, : ours.size(1)].float() - ours).abs().amax(1)
        for theirs, ours in zip(found, expected.logits, strict=True)
    ]
    is_clear = torch.cat(expected.is_clear)
    largest = float(torch.cat(differences)[is_clear].max())
    if not largest <= TOLERANCE:  # NaN is no pass
        raise ExportError(
            f"{client} computes another model: largest logit difference {largest:.3g} on {held_out.words} "
            f"where {TOLERANCE:g} is allowed. Nothing was kept"
        )
    left_out = "" if is_clear.all() else ", the others left out by ties"
    return (
        f"{client} computes the same: largest logit difference {largest:.2g} over {int(is_clear.sum()):,} of "
        f"{is_clear.numel():,} tokens ({held_out.words}{left_out})"
        + _check_window(differences, expected.window)
    )


def _check_window(differences: Sequence[Tensor], window: int | None) -> str:
    """Return what is to be said of the window. Raises ExportError where nothing past it agrees."""
    if window is None:
        return ""
    if window > MAX_TRIED_WINDOW:
        return f"; its sliding window of {window:,} is too long to be tried"
    past = torch.cat([row[(window + len(row)) // 2 :] for row in differences if len(row) > window])
    n_agreeing, n_needed = int((past <= TOLERANCE).sum()), min(MIN_PAST_WINDOW, len(past))
    if n_agreeing < n_needed:
        raise ExportError(
            f"only {n_agreeing} of {len(past)} tokens past the sliding window of {window} agree where "
            f"{n_needed} are needed, so that it was not seen to hide anything. Nothing was kept"
        )
    return f"; {n_agreeing:,} of {len(past):,} well past the sliding window agree"
