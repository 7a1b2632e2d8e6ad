"""`turnout prepare`: check the command line's arguments, and pass them to data/prepare.py."""

import os
from collections.abc import Sequence
from pathlib import Path

from turnout.data.manifest import CorpusManifest
from turnout.data.prepare import prepare_corpus
from turnout.data.sources import embedded_sources
from turnout.launch.arguments import check_at_least, parse_sources
from turnout.launch.console import PrepareConsole
from turnout.training.errors import ConfigError

DEFAULT_VOCAB_SIZE = 32_768


def run_prepare(
    inputs: Sequence[str],
    *,
    out: Path,
    embedded: bool,
    weights: Sequence[str],
    tokenizer: Path | None,
    vocab_size: int | None,
    text_field: str | None,
    valid_frac: float,
    workers: int | None,
) -> None:
    """Prepare a corpus and print a summary of it. Raises ConfigError or DataError."""
    if embedded == bool(inputs):
        raise ConfigError("name some input, as PATH or NAME=PATH, or pass --embedded, but not both")
    if not 0 <= valid_frac < 1:
        raise ConfigError(f"--valid-frac {valid_frac} must be at least 0 and below 1; 0.01 is usual")
    if vocab_size is None and tokenizer is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size {vocab_size} must be positive; 32768 is usual")
    if embedded and (weights or text_field is not None):
        raise ConfigError("--weight and --text-field have no effect with --embedded; drop them")
    check_at_least(1, {"--workers": workers})
    sources = embedded_sources() if embedded else parse_sources(inputs, weights, text_field or "text")
    console = PrepareConsole()
    try:
        manifest = prepare_corpus(
            sources=sources,
            out=out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            valid_frac=valid_frac,
            n_workers=workers or len(os.sched_getaffinity(0)),
            report=console.report,
        )
    finally:
        console.close()
    _print_summary(out, manifest)


def _print_summary(out: Path, manifest: CorpusManifest) -> None:
    for source in manifest.sources:
        train, valid = source.splits["train"], source.splits["valid"]
        skipped = f", {source.n_skipped_files} files skipped (not UTF-8)" if source.n_skipped_files else ""
        print(
            f"{source.name}: weight {source.weight:.4g}, {train.n_documents:,} documents ({train.n_tokens:,} "
            f"tokens) to train on, {valid.n_documents:,} held out{skipped}"
        )
    print(f"corpus {out}: vocabulary {manifest.vocab_size}, hash {manifest.corpus_hash}")
