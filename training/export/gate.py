"""The gate of every export: the other program must compute the logits that our model computes.

transformers_logits and llama_cpp_logits load what was written, as a user would, and check_logits
compares. Both sides run in fp32 on the stored values, so rounding to bf16 or Q8_0 makes no difference; only
the order of sums does. Unlike the writer, the gate needs memory for the whole model in fp32: first for ours,
then, after that is freed, for the other program's.

Where a token's last chosen expert and the next one score within TIE of each other, rounding alone may swap
them, and from that token on the logits may differ. So a row counts only up to its first such token. Where too
few tokens count, other rows are tried.

A sliding window of up to MAX_TRIED_WINDOW tokens must be seen to hide something. A long one gets a row of its
own that is longer than the window. Ties nearly always come before the end of that row, so there only some
tokens have to agree: with other keys none would, except by chance. A longer window is reported as not tried.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from turnout.data.corpus import Corpus
from turnout.data.errors import DataError
from turnout.data.tokenizer import Tokenizer
from turnout.moe.config import ModelConfig
from turnout.moe.router import Router
from turnout.training.checkpoint.weights import Weights, load_decoder
from turnout.training.errors import ExportError
from turnout.training.export.gguf_file import Kind
from turnout.training.export.huggingface import PROBES

TOLERANCE = 1e-4  # of a logit, absolute
TIE = 1e-5  # of the largest score
N_TOKENS = 1024
ROW_TOKENS = 128  # many short rows: each is compared up to its first tie
MIN_COMPARED = 32
MIN_COMPARED_FRAC = 0.05
N_TRIES = 4  # sets of pseudo-random rows to try after the first set
MAX_TRIED_WINDOW = 8192  # the logits of a longer row take many GB, on both sides
MIN_PAST_WINDOW = 8
SEED = 20_240_229


@dataclass(frozen=True)
class HeldOut:
    """The rows of tokens on which an export is tried, each [length] int64, and a description of them."""

    rows: tuple[Tensor, ...]
    description: str


@dataclass(frozen=True)
class Expected:
    """What our model computes for some rows.

    logits     of each row [length, V] fp32
    is_clear   of each row [length] bool: no expert was nearly tied, at this token or before
    window     the model's sliding window
    """

    logits: tuple[Tensor, ...]
    is_clear: tuple[Tensor, ...]
    window: int | None


class Rounded:
    """A model's weights, rounded as a file of lower precision stores them."""

    def __init__(self, weights: Weights, to_stored: Callable[[str, Tensor], Tensor]) -> None:
        self.place, self.cfg, self.tokenizer_path = weights.place, weights.cfg, weights.tokenizer_path
        self.read_bias = weights.read_bias
        self._weights, self._to_stored = weights, to_stored

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Return a parameter, or one expert's part of it, fp32, of the parameter's shape."""
        return self._to_stored(name, self._weights.read(name, expert))


class _Shortened:
    """A model's weights for shorter sequences. RoPE rotates a position alike at every sequence length."""

    def __init__(self, weights: Weights, seq_len: int) -> None:
        self.place, self.tokenizer_path = weights.place, weights.tokenizer_path
        self.cfg = weights.cfg.model_copy(update={"seq_len": seq_len})
        self.read, self.read_bias = weights.read, weights.read_bias


def held_out_tokens(cfg: ModelConfig, corpus: Corpus | None) -> HeldOut:
    """Return text that no step has trained on, or pseudo-random tokens.

    The latter where there is no corpus, where it has too little held-out text, and where it cannot be read:
    that must not cost an export whose files are already written.
    """
    lengths = row_lengths(cfg)
    if corpus is None:
        return random_tokens(cfg)
    with suppress(DataError, OSError):
        for stream in corpus.split("valid"):
            if stream.n_tokens >= sum(lengths):
                tokens = torch.as_tensor(stream.read(0, sum(lengths)).astype("int64"))
                return HeldOut(tokens.split(lengths), f"held-out text of {corpus.path}")
    return random_tokens(cfg)


def random_tokens(cfg: ModelConfig, seed: int = SEED) -> HeldOut:
    """Return pseudo-random tokens: the same for every model of a vocabulary, length and window."""
    lengths = row_lengths(cfg)
    tokens = torch.randint(cfg.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return HeldOut(tokens.split(lengths), "pseudo-random tokens")


def row_lengths(cfg: ModelConfig) -> list[int]:
    """Return the tokens of each row: short rows, and one that is longer than a long sliding window."""
    short = min(cfg.seq_len, ROW_TOKENS)
    lengths = [short] * -(-N_TOKENS // short)
    if cfg.sliding_window is not None and cfg.sliding_window <= MAX_TRIED_WINDOW:
        long = min(cfg.seq_len, cfg.sliding_window + max(64, cfg.sliding_window // 4))
        lengths += [long] if long > short else []
    return lengths


@torch.no_grad()
def expected_logits(weights: Weights, rows: Sequence[Tensor]) -> Expected:
    """Return what our model computes for rows of tokens, each [length] and one document."""
    parts = []
    for length, equal in groupby(rows, len):  # rows of one length are adjacent, and share a decoder
        parts += _expected_of_equal(weights, length, list(equal))
    logits, is_clear = zip(*parts, strict=True)
    return Expected(logits, is_clear, weights.cfg.sliding_window)


def _expected_of_equal(weights: Weights, length: int, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return logits and is_clear of rows of one length. Frees its decoder before the next is loaded."""
    decoder, state = load_decoder(_Shortened(weights, length))
    close, found = list[Tensor](), []

    def note_ties(router: nn.Module, arguments: tuple[Any, ...], _: object) -> None:
        assert isinstance(router, Router)
        close.append(_is_close(router, *arguments[:2]))

    for module in decoder.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note_ties)
    for row in rows:
        close.clear()
        one = row.unsqueeze(0)
        hidden, _ = decoder(one, torch.zeros_like(one), torch.ones_like(one, dtype=torch.bool), state)
        found.append((decoder.logits(hidden)[0], torch.stack(close).any(0).cumsum(0) == 0))
    return found


def _is_close(router: Router, x_TD: Tensor, bias_E: Tensor) -> Tensor:
    """Return where the last chosen expert and the first one left out have nearly the same score, [T] bool."""
    logits_TE = nn.functional.linear(x_TD, router.weight)
    scores_TE = logits_TE.softmax(-1) if router.cfg.router.score == "softmax" else logits_TE.sigmoid()
    best = (scores_TE + bias_E).sort(-1, descending=True).values
    k = router.cfg.top_k
    if k == router.cfg.n_experts:
        return torch.zeros(len(x_TD), dtype=torch.bool)
    return best[:, k - 1] - best[:, k] <= TIE * scores_TE.max(-1).values


def choose_rows(
    weights: Weights,
    corpus: Corpus | None,
    compute: Callable[[Weights, Sequence[Tensor]], Expected] = expected_logits,
) -> tuple[HeldOut, Expected]:
    """Return the first set of rows with enough tokens to compare, and what our model computes for it.

    Tries held-out text of the corpus, then pseudo-random rows; compute gets the rows, each [length]. Raises
    ExportError where no set has enough.
    """
    fault = None
    for number in range(N_TRIES + 1):
        tried = (
            held_out_tokens(weights.cfg, corpus) if number == 0 else random_tokens(weights.cfg, SEED + number)
        )
        expected = compute(weights, tried.rows)
        if (fault := shortage(expected)) is None:
            return tried, expected
    raise ExportError(
        f"too few tokens can be compared in any of {N_TRIES + 1} sets of rows: {fault}. Some router scores "
        f"two experts within {TIE:g} of each other, and after that either may be chosen; nothing was kept"
    )


def shortage(expected: Expected) -> str | None:
    """Return why too little can be compared to prove anything; None where it is enough."""
    is_clear = torch.cat([row for row in expected.is_clear if len(row) <= ROW_TOKENS])
    n_compared, n_tokens = int(is_clear.sum()), is_clear.numel()
    n_needed = min(n_tokens, max(MIN_COMPARED, math.ceil(MIN_COMPARED_FRAC * n_tokens)))
    return None if n_compared >= n_needed else f"only {n_compared} of {n_tokens} where {n_needed} are needed"


def check_tokenizer(directory: Path, ours: Tokenizer, texts: Sequence[str]) -> None:
    """Raise ExportError where AutoTokenizer gives other ids than training did, or other control ids."""
    import transformers

    with _quiet():
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            control = (theirs.bos_token_id, theirs.eos_token_id)
            spelled = [f"a{theirs.bos_token}b{theirs.eos_token} c"]
            differing = [
                text
                for text in (*PROBES, *spelled, *texts)
                if theirs.encode(text, add_special_tokens=False) != ours.encode(text)
                or theirs.encode(text) != [ours.bos_id, *ours.encode(text)]
            ]
        except Exception as err:
            raise ExportError(
                f"{transformers_name()} cannot load the tokenizer: {err}; nothing was kept"
            ) from err
    if control != (ours.bos_id, ours.eos_id):
        raise ExportError(
            f"transformers begins and ends a text with ids {control}, and the model with "
            f"{(ours.bos_id, ours.eos_id)}; nothing was kept"
        )
    if differing:
        raise ExportError(f"transformers tokenises {differing[0][:60]!r} differently; nothing was kept")


@torch.no_grad()
def transformers_logits(directory: Path, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return transformers' fp32 logits [length, V] of each row of tokens [length].

    Raises ExportError where it cannot load the model, misses a tensor, or finds one that it does not know.
    """
    import transformers  # seconds to import, and only an export needs it

    with _quiet():
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,  # a stranger's directory may hold a pickle beside them
                # The config must not choose code either: neither its own nor downloaded kernels.
                trust_remote_code=False,
                attn_implementation="sdpa",
                return_dict=True,
            )
        except Exception as err:  # whatever transformers raises, the directory must not be kept
            raise ExportError(f"{transformers_name()} cannot load it: {err}; nothing was kept") from err
    info = info if isinstance(info, dict) else vars(info)
    for kind, found in info.items():
        if found:
            first = next(iter(found), found)
            raise ExportError(f"{transformers_name()} loads it with {kind} {first}; nothing was kept")
    model.eval()
    return [model(row.unsqueeze(0), use_cache=False).logits[0] for row in rows]


def transformers_name() -> str:
    """Return transformers' name and version."""
    import transformers

    return f"transformers {transformers.__version__}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' log lines and progress bars off the terminal; its exceptions still arrive."""
    from transformers.utils import logging as their_logging

    level, has_bar = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if has_bar:
            their_logging.enable_progress_bar()


def check_logits(found: Sequence[Tensor], expected: Expected, *, client: str, held_out: HeldOut) -> str:
    """Compare the logits of another program, of each row [length, V], with ours; return the result in words.

    client: the program's name and version. Raises ExportError where they differ by more than TOLERANCE.
    """
    differences = [
        (theirs[:, : ours.size(1)].float() - ours).abs().amax(1)
        for theirs, ours in zip(found, expected.logits, strict=True)
    ]
    is_clear = torch.cat(expected.is_clear)
    largest = float(torch.cat(differences)[is_clear].max())
    if not largest <= TOLERANCE:  # NaN fails too
        raise ExportError(
            f"{client} computes another model: largest logit difference {largest:.3g} on "
            f"{held_out.description} where {TOLERANCE:g} is allowed; nothing was kept"
        )
    left_out = "" if is_clear.all() else ", without those after a tie of experts"
    return (
        f"{client} computes the same: largest logit difference {largest:.2g} over {int(is_clear.sum()):,} of "
        f"{is_clear.numel():,} tokens ({held_out.description}{left_out})"
        + _check_window(differences, expected.window)
    )


def _check_window(differences: Sequence[Tensor], window: int | None) -> str:
    """Return the words about the sliding window. Raises ExportError where too little past it agrees."""
    if window is None:
        return ""
    if window > MAX_TRIED_WINDOW:
        return f"; its sliding window of {window:,} is too long to be tried"
    past = torch.cat([row[(window + len(row)) // 2 :] for row in differences if len(row) > window])
    n_agreeing, n_needed = int((past <= TOLERANCE).sum()), min(MIN_PAST_WINDOW, len(past))
    if n_agreeing < n_needed:
        raise ExportError(
            f"only {n_agreeing} of {len(past)} tokens past the sliding window of {window} agree where "
            f"{n_needed} are needed to show that it hides anything; nothing was kept"
        )
    return f"; {n_agreeing:,} of {len(past):,} well past the sliding window agree"


def has_llama_cpp() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def load_llama_cpp(path: Path, n_tokens: int = 8) -> Any:
    """Load a file with llama.cpp for rows of up to n_tokens. Raises ExportError where that fails.

    The key-value cache is fp32: the default, fp16, alone changes logits by 1e-2.
    """
    import llama_cpp  # optional, and a large native library

    try:
        return llama_cpp.Llama(
            model_path=str(path),
            n_ctx=n_tokens,
            n_batch=n_tokens,
            n_ubatch=n_tokens,
            logits_all=True,
            verbose=False,
            flash_attn=False,
            type_k=Kind.F32.value,
            type_v=Kind.F32.value,
        )
    except Exception as err:  # whatever llama.cpp raises, the file must not be kept
        raise ExportError(f"{llama_cpp_name()} cannot load it: {err}; nothing was kept") from err


def llama_cpp_logits(path: Path, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return llama.cpp's logits [length, V] of each row of tokens [length]."""
    model = load_llama_cpp(path, max(map(len, rows)))
    logits = []
    for row in rows:
        model.reset()
        model.eval(row.tolist())
        logits.append(torch.from_numpy(np.array(model.scores[: len(row)])))
    return logits


def llama_cpp_name() -> str:
    """Return llama.cpp's name and version."""
    import llama_cpp

    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
