"""The gate of every export: the client loads what was written and must compute what our model computes.

Both sides run in fp32 with the numbers as they were stored, so rounding to bf16 or Q8_0 is no difference,
and the order of sums is all that remains. Unlike the writer the gate needs memory for the whole model in
fp32: ours first, and when that is gone the client's.

Where two experts of a token are within TIE of each other, rounding alone may choose the other one, and from
that token on nothing can be compared: a row counts up to its first such token. Where too few count, other
rows are tried.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.corpus import Corpus
from moe.config import ModelConfig
from moe.router import Router
from training.errors import ExportError
from training.weights import Weights, load_decoder

TOLERANCE = 1e-4  # of a logit, absolute
TIE = 1e-5  # of the largest score
N_TOKENS = 1024
ROW_TOKENS = 128  # many short rows: each is compared up to its first tie
MIN_COMPARED = 32
MIN_COMPARED_FRAC = 0.05
N_TRIES = 4  # of pseudo-random rows, where the first rows do not do
SEED = 20_240_229


@dataclass(frozen=True)
class HeldOut:
    """The tokens [n, length] on which an export is tried, and what to call them."""

    tokens: Tensor
    words: str


@dataclass(frozen=True)
class Expected:
    """What our model computes of some tokens.

    logits     [n, length, V] fp32
    is_clear   [n, length] bool: no two experts were too close, here or before
    """

    logits: Tensor
    is_clear: Tensor


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
    """Return the same tokens for every model of a vocabulary and length."""
    tokens = torch.randint(cfg.vocab_size, _shape(cfg), generator=torch.Generator().manual_seed(seed))
    return HeldOut(tokens, "pseudo-random tokens")


def held_out_tokens(cfg: ModelConfig, corpus: Corpus) -> HeldOut | None:
    """Return text that no step has trained on; None where the corpus has too little of it."""
    n_rows, length = _shape(cfg)
    for stream in corpus.split("valid"):
        if stream.n_tokens >= n_rows * length:
            tokens = torch.as_tensor(stream.read(0, n_rows * length).astype("int64"))
            return HeldOut(tokens.view(n_rows, length), f"held-out text of {corpus.path}")
    return None


def _shape(cfg: ModelConfig) -> tuple[int, int]:
    """Return how many rows of which length are tried: a sliding window has to have slid over half of one."""
    length = min(cfg.seq_len, max(ROW_TOKENS, 2 * (cfg.sliding_window or 0)))
    return -(-N_TOKENS // length), length


def choose_rows(weights: Weights, first: HeldOut) -> tuple[HeldOut, Expected]:
    """Return the first rows of which enough can be compared, and what our model makes of them.

    Raises ExportError where neither those given nor pseudo-random ones do.
    """
    cfg, fault = weights.cfg, None
    for number in range(N_TRIES + 1):
        tried = first if number == 0 else random_tokens(cfg, SEED + number)
        expected = expected_logits(weights, tried.tokens)
        if (fault := shortage(expected, cfg.sliding_window)) is None:
            return tried, expected
    raise ExportError(
        f"too few tokens can be compared, of {N_TRIES + 1} sets of rows: {fault}. Some router scores two "
        f"experts within {TIE:g} of each other, and from there on either may be chosen; nothing was exported"
    )


def shortage(expected: Expected, sliding_window: int | None) -> str | None:
    """Return why what can be compared proves too little; None where it is enough."""
    is_clear = expected.is_clear
    n_compared, n_tokens = int(is_clear.sum()), is_clear.numel()
    n_needed = min(n_tokens, max(MIN_COMPARED, math.ceil(MIN_COMPARED_FRAC * n_tokens)))
    if n_compared < n_needed:
        return f"only {n_compared} of {n_tokens} where {n_needed} are needed"
    if sliding_window is not None and not is_clear[:, sliding_window:].any():
        return f"none past the sliding window of {sliding_window}, which therefore hid nothing"
    return None


@torch.no_grad()
def expected_logits(weights: Weights, tokens: Tensor) -> Expected:
    """Return what our model makes of tokens [n, length], each row one document."""
    decoder, state = load_decoder(_Shortened(weights, tokens.size(1)))
    close: list[Tensor] = []

    def note(router: nn.Module, arguments: tuple, _: object) -> None:
        assert isinstance(router, Router)
        close.append(_is_close(router, *arguments[:2]))

    for module in decoder.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    rows, is_clear = [], []
    for row in tokens.unbind():
        close.clear()
        one = row.unsqueeze(0)
        hidden, _ = decoder(one, torch.zeros_like(one), torch.ones_like(one, dtype=torch.bool), state)
        rows.append(decoder.logits(hidden)[0])
        is_clear.append(torch.stack(close).any(0).cumsum(0) == 0)
    return Expected(torch.stack(rows), torch.stack(is_clear))


def _is_close(router: Router, x_TD: Tensor, bias_E: Tensor) -> Tensor:
    """Return where the last chosen and the first expert left out have nearly the same score, [T] bool."""
    logits_TE = nn.functional.linear(x_TD, router.weight)
    scores_TE = logits_TE.softmax(-1) if router.cfg.router.score == "softmax" else logits_TE.sigmoid()
    best = (scores_TE + bias_E).sort(-1, descending=True).values
    k = router.cfg.top_k
    if k == router.cfg.n_experts:
        return torch.zeros(len(x_TD), dtype=torch.bool)
    return best[:, k - 1] - best[:, k] <= TIE * scores_TE.max(-1).values


def check_logits(found: Tensor, expected: Expected, *, client: str, held_out: HeldOut) -> str:
    """Return in words how close the client's logits [n, length, V] are. Raises ExportError."""
    is_clear, n_vocab = expected.is_clear, expected.logits.size(-1)
    n_compared = int(is_clear.sum())
    difference = (found[..., :n_vocab].float() - expected.logits).abs()[is_clear]
    largest = float(difference.max())
    if not largest <= TOLERANCE:  # NaN is no pass
        raise ExportError(
            f"{client} computes another model than the one that was exported: largest logit difference "
            f"{largest:.3g} on {held_out.words} where {TOLERANCE:g} is allowed. Nothing was exported"
        )
    left_out = "" if is_clear.all() else ", the others left out by ties"
    return (
        f"{client} computes the same: largest logit difference {largest:.2g} over {n_compared:,} of "
        f"{is_clear.numel():,} tokens ({held_out.words}{left_out})"
    )
