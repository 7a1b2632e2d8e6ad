"""`turnout generate`: continuations on stdout; the model, the speed and warnings on stderr."""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from turnout.launch.arguments import check_at_least, check_text
from turnout.launch.models import load_tokenizer_of, open_weights
from turnout.moe.config import ModelConfig
from turnout.moe.experts.experts import choose_backend
from turnout.moe.flops import n_params
from turnout.moe.kv_cache import CachedDecoder
from turnout.training.checkpoint.weights import Weights, load_decoder
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.generation.generate import Options, TextPiece, stream_texts
from turnout.training.generation.sampling import Sampling

# Dividing logits by less than this could overflow fp32, and then no token can be sampled.
MIN_TEMPERATURE = 0.01
MAX_SEED = 2**62  # torch's seeds have 64 bits, and each text adds 1


@dataclass(frozen=True)
class Placement:
    """How a model is held: its dtype, and whether accelerate spreads it over devices.

    max_bytes: limit for the weights on each device; None: what is free
    """

    dtype: torch.dtype
    is_spread: bool
    max_bytes: int | None

    @classmethod
    def of(cls, dtype: str, *, is_spread: bool, max_memory: str | None) -> "Placement":
        """Build from the command's options. Raises ConfigError if max_memory is not a size."""
        max_bytes = None
        if max_memory is not None:
            # Imported here because it takes a second, which few commands need.
            from accelerate.utils.modeling import convert_file_size_to_int

            try:
                max_bytes = convert_file_size_to_int(max_memory)
            except ValueError as err:
                raise ConfigError(
                    f"--max-memory {max_memory} is not a size; write it like 20GiB or 500MiB"
                ) from err
            if max_bytes < 1:
                raise ConfigError(f"--max-memory {max_memory} is too small; write it like 20GiB or 500MiB")
        return cls(getattr(torch, dtype), is_spread or max_memory is not None, max_bytes)


def build_options(
    sampling: Sampling, *, max_tokens: int, seed: int, n_samples: int, stop: tuple[str, ...]
) -> Options:
    """Return the options. Raises ConfigError for a value out of range, or an option that has no effect."""
    check_at_least(1, {"--max-tokens": max_tokens, "--n-samples": n_samples, "--top-k": sampling.top_k})
    if not 0 <= seed < MAX_SEED:
        raise ConfigError(f"--seed {seed} must be 0 to {MAX_SEED - 1}")
    if sampling.temperature != 0 and not MIN_TEMPERATURE <= sampling.temperature <= 1 / MIN_TEMPERATURE:
        raise ConfigError(
            f"--temperature {sampling.temperature:g} must be 0 (the most likely token), or "
            f"{MIN_TEMPERATURE:g} to {1 / MIN_TEMPERATURE:g}"
        )
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ConfigError(f"--top-p {sampling.top_p:g} must be above 0 and at most 1")
    if sampling.min_p is not None and not 0 <= sampling.min_p <= 1:
        raise ConfigError(f"--min-p {sampling.min_p:g} must be 0 to 1")
    if sampling.temperature == 0:
        idle = {"--top-k": sampling.top_k, "--top-p": sampling.top_p, "--min-p": sampling.min_p}
        idle["--n-samples"] = n_samples if n_samples > 1 else None
        for option, value in idle.items():
            if value is not None:
                raise ConfigError(
                    f"{option} {value:g} has no effect with --temperature 0, which does not sample; drop one"
                )
    if "" in stop:
        raise ConfigError("--stop '' would end every text before it begins; drop it")
    return Options(max_tokens=max_tokens, sampling=sampling, seed=seed, n_samples=n_samples, stop=stop)


def read_prompts(given: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return the prompts given, then those of the files; if there are none, stdin as one prompt.

    The last newline of a file is not part of its prompt: editors add it. Raises ConfigError if there is no
    prompt, or one is not UTF-8.
    """
    for i, prompt in enumerate(given, start=1):
        check_text(prompt, f"prompt {i}")
    prompts = [*given, *(_decode(_read(path), str(path)) for path in files)]
    if prompts:
        return prompts
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(
            'there is no prompt; give one, such as "import os", or --prompt-file, or pipe one in'
        )
    return [_decode(sys.stdin.buffer.read(), "stdin")]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"--prompt-file {path}: {err.strerror or err}; name a file of text") from err


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{where}: byte {err.start} is not UTF-8; give text in UTF-8") from err


def write_texts(
    path: Path, prompts: Sequence[str], options: Options, placement: Placement, *, is_streamed: bool
) -> None:
    """Load a model and print its continuations. Raises ConfigError, CheckpointError or DataError."""
    weights = open_weights(path)
    tokenizer = load_tokenizer_of(weights)
    with _loaded_model(weights, placement) as model:
        start_s, ends, n_tokens = time.perf_counter(), Counter[str](), 0
        n_texts = len(prompts) * options.n_samples
        pieces = stream_texts(model, tokenizer, prompts, options)
        try:
            for piece in _printed(pieces, n_texts, options.n_samples, is_streamed=is_streamed):
                n_tokens += 1
                ends.update([piece.end] if piece.end is not None else [])
        except CheckpointError as err:
            raise CheckpointError(f"{weights.place}: {err}") from err
        _report_end(n_tokens, time.perf_counter() - start_s, ends, weights.cfg)


@contextmanager
def _loaded_model(weights: Weights, placement: Placement) -> Iterator[CachedDecoder]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = choose_backend(weights.cfg, device, placement.dtype)
    size = f"{weights.place}: {n_params(weights.cfg):,} parameters in {str(placement.dtype).split('.')[-1]}"
    if not placement.is_spread:
        decoder, state = load_decoder(weights, device=device, dtype=placement.dtype, expert_backend=backend)
        _report(f"{size} on {device}")
        yield CachedDecoder(decoder.requires_grad_(False), state)
        return
    # Imported here because accelerate takes a second, which few commands need.
    from turnout.training.generation.offload import load_spread

    with tempfile.TemporaryDirectory(prefix="turnout-") as directory:
        model, where = load_spread(
            weights,
            max_bytes=placement.max_bytes,
            offload_dir=Path(directory),
            dtype=placement.dtype,
            expert_backend=backend,
        )
        _report(f"{size}; {where}")
        yield model


def _printed(
    pieces: Iterable[TextPiece], n_texts: int, n_samples: int, *, is_streamed: bool
) -> Iterator[TextPiece]:
    """Print the texts while passing their pieces on: a single text piece by piece, several in row order."""
    texts, ended, n_printed = [""] * n_texts, set[int](), 0
    for piece in pieces:
        if n_texts == 1 and is_streamed:
            _write(piece.text)
        else:
            texts[piece.row] += piece.text
        if piece.end is not None:
            ended.add(piece.row)
        while n_printed in ended:
            _write(f"{_title(n_printed, n_texts, n_samples)}{texts[n_printed]}\n")
            n_printed += 1
        yield piece


def _title(row: int, n_texts: int, n_samples: int) -> str:
    if n_texts == 1:
        return ""
    sample = f", sample {row % n_samples + 1} of {n_samples}" if n_samples > 1 else ""
    return f"--- prompt {row // n_samples + 1} of {n_texts // n_samples}{sample} ---\n"


def _write(text: str) -> None:
    if sys.stdout.isatty():
        # Control characters from a model must not reach the terminal.
        text = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _report_end(n_tokens: int, elapsed_s: float, ends: Counter[str], cfg: ModelConfig) -> None:
    _report(f"{n_tokens} tokens in {elapsed_s:.1f} s, {n_tokens / elapsed_s:,.1f} tokens/s")
    if n_cut := ends["seq_len"]:
        _report(
            f"{n_cut} of {ends.total()} texts were cut at {cfg.seq_len} tokens, prompt included: the model "
            "was trained on this seq_len, and has no sliding window that would allow more"
        )


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
