"""The manifest of a finished corpus: `corpus.json`, written last.

`corpus_hash` is the identity of the text: its documents, their order, the split and the weights. It does not
depend on the tokenizer (which has its own hash) or on how the tokens were cut into shards.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from turnout.data.errors import DataError
from turnout.data.files import write_atomically

FORMAT_VERSION = 1
MANIFEST_FILE = "corpus.json"
PLAN_FILE = "plan.json"
SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    shards: tuple[str, ...]  # file names without suffix, inside the split's directory
    n_documents: int
    n_tokens: int
    n_text_bytes: int


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    name: str
    weight: float  # as given, or else the source's fraction of all train tokens
    text_sha256: str  # over the SHA-256 of each document, in order
    n_skipped_files: int  # embedded corpus only: files that are not UTF-8
    splits: dict[str, SplitSummary]


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    format_version: int
    corpus_hash: str
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    valid_frac: float
    sources: tuple[SourceSummary, ...]

    def total(self, split: str) -> SplitSummary:
        """Return the sum of a split over all sources."""
        parts = [source.splits[split] for source in self.sources]
        return SplitSummary(
            shards=tuple(shard for part in parts for shard in part.shards),
            n_documents=sum(part.n_documents for part in parts),
            n_tokens=sum(part.n_tokens for part in parts),
            n_text_bytes=sum(part.n_text_bytes for part in parts),
        )


def corpus_hash_of(text_hashes: Sequence[str], weights: Sequence[float | None], valid_frac: float) -> str:
    """Return the identity of the text. A weight is as given, or None if the number of tokens decides."""
    identity = {"text_sha256": list(text_hashes), "weights": list(weights), "valid_frac": valid_frac}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, manifest: CorpusManifest) -> None:
    write_atomically(directory / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(directory: Path) -> CorpusManifest:
    """Read corpus.json. Raises DataError if it is missing, damaged or of another version."""
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise DataError(f"{directory}: no such corpus directory; make it with `turnout prepare`")
    if not path.is_file():
        if (directory / PLAN_FILE).is_file():
            raise DataError(
                f"{directory}: prepare was interrupted ({PLAN_FILE} but no {MANIFEST_FILE}); "
                "run the same `turnout prepare` again, it continues where it stopped"
            )
        raise DataError(
            f"{directory}: not a corpus, it has no {MANIFEST_FILE}; make one with `turnout prepare`"
        )
    try:
        values = json.loads(path.read_bytes())
        found = values["format_version"]
        if found != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version={found} where {FORMAT_VERSION} is read; prepare the corpus again"
            )
        return _to_manifest(values)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(f"{path}: damaged ({type(err).__name__}: {err}); prepare the corpus again") from err


def _to_manifest(values: dict[str, Any]) -> CorpusManifest:
    sources = []
    for source in values["sources"]:
        splits = {
            name: SplitSummary(**{**split, "shards": tuple(split["shards"])})
            for name, split in source["splits"].items()
        }
        sources.append(SourceSummary(**{**source, "splits": splits}))
    plain = {field.name: values[field.name] for field in fields(CorpusManifest) if field.name != "sources"}
    return CorpusManifest(**plain, sources=tuple(sources))
