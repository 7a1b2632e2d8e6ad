"""Call `prepare_corpus` in tests, and compare the files it leaves."""

from pathlib import Path
from typing import Any

from turnout.data.prepare import prepare_corpus
from turnout.data.sources import Source


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def prepare(out: Path, *sources: Source, **changes: Any) -> Any:
    call: dict[str, Any] = {
        "sources": sources, "out": out, "tokenizer": None, "vocab_size": 300, "valid_frac": 0.1,
        "shard_tokens": 400, "n_workers": 1,
    }  # fmt: skip
    return prepare_corpus(**{**call, **changes})
