"""A prepared corpus on disk, opened for reading: the tokens of each source as one stream.

Opening reads the small JSON files and compares sizes, or hashes when asked. Token files are mapped on first
use.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from turnout.data.errors import DataError
from turnout.data.files import sha256_of
from turnout.data.manifest import CorpusManifest, SourceSummary, read_manifest
from turnout.data.megatron import Shard, ShardInfo, Verify, check_shard, read_shard_info, shard_file
from turnout.data.tokenizer import Tokenizer, load_tokenizer


class TokenStream:
    """The documents of one source and split, one after another, as one sequence of tokens."""

    def __init__(self, name: str, weight: float, shards: Sequence[tuple[Path, ShardInfo]]) -> None:
        self.name, self.weight = name, weight
        self._stems = [stem for stem, _ in shards]
        self._shards: list[Shard | None] = [None] * len(shards)
        # Token and document offsets of the shards, with the end of the last: [n_shards + 1].
        self._token_edges = np.cumsum([0, *(info.n_tokens for _, info in shards)], dtype=np.int64)
        self._document_edges = np.cumsum([0, *(info.n_documents for _, info in shards)], dtype=np.int64)

    @property
    def n_tokens(self) -> int:
        return int(self._token_edges[-1])

    @property
    def n_documents(self) -> int:
        return int(self._document_edges[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length), across shards, in the dtype they are stored in."""
        parts = [self._shard(k).tokens[low:high] for k, low, high in self._spans(start, length)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts_within(self, start: int, length: int) -> np.ndarray:
        """Return the stream offsets in [start, start + length) where documents start, ascending, int64."""
        parts = []
        for k, low, high in self._spans(start, length):
            starts = self._shard(k).starts
            first, last = np.searchsorted(starts, [low, high])
            parts.append(starts[first:last] + self._token_edges[k])
        return np.concatenate(parts)

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document, `[bos, *ids, eos]`. Raises IndexError."""
        if not 0 <= number < self.n_documents:
            raise IndexError(f"source {self.name!r}: document {number} of {self.n_documents}")
        k = int(np.searchsorted(self._document_edges, number, side="right")) - 1
        return self._shard(k).document(number - int(self._document_edges[k]))

    def _spans(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """Return (shard, low, high) for each shard that the range touches, in the shard's own offsets."""
        end = start + length
        if start < 0 or length < 1 or end > self.n_tokens:
            raise IndexError(f"source {self.name!r}: tokens [{start}, {end}) of {self.n_tokens}")
        first = int(np.searchsorted(self._token_edges, start, side="right")) - 1
        last = int(np.searchsorted(self._token_edges, end, side="left")) - 1
        edges = self._token_edges
        return [
            (k, max(start - int(edges[k]), 0), int(min(end, edges[k + 1]) - edges[k]))
            for k in range(first, last + 1)
        ]

    def _shard(self, k: int) -> Shard:
        shard = self._shards[k]
        if shard is None:
            shard = self._shards[k] = Shard(self._stems[k])
        return shard


class Corpus:
    """A checked corpus: its manifest, its tokenizer and its token streams."""

    def __init__(self, path: Path, manifest: CorpusManifest, streams: dict[str, list[TokenStream]]) -> None:
        self.path, self.manifest, self._streams = path, manifest, streams

    @property
    def tokenizer_path(self) -> Path:
        return self.path / self.manifest.tokenizer_file

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_path)

    def split(self, name: str) -> list[TokenStream]:
        """Return the streams of "train" or "valid", one for each source, in the manifest's order."""
        return self._streams[name]


def open_corpus(path: Path, *, verify: Verify) -> Corpus:
    """Open a corpus after checking that its files are as they were prepared. Raises DataError if not.

    verify "size" compares names, sizes and descriptions; "checksum" also reads every byte.
    """
    manifest = read_manifest(path)
    tokenizer_path = path / manifest.tokenizer_file
    if not tokenizer_path.is_file():
        raise DataError(f"{tokenizer_path}: the corpus's tokenizer is missing; copy the corpus whole")
    if (actual := sha256_of(tokenizer_path)) != manifest.tokenizer_sha256:
        raise DataError(
            f"{tokenizer_path}: SHA-256 {actual[:16]}.. where the corpus was tokenised with "
            f"{manifest.tokenizer_sha256[:16]}..; put the original tokenizer back or prepare again"
        )
    streams = {
        split: [_open_stream(path / split, source, split, manifest, verify) for source in manifest.sources]
        for split in manifest.sources[0].splits
    }
    return Corpus(path, manifest, streams)


def _open_stream(
    directory: Path, source: SourceSummary, split: str, manifest: CorpusManifest, verify: Verify
) -> TokenStream:
    summary = source.splits[split]
    shards: list[tuple[Path, ShardInfo]] = []
    for name in summary.shards:
        stem = directory / name
        info = read_shard_info(stem)
        if info.tokenizer_sha256 != manifest.tokenizer_sha256:
            raise DataError(
                f"{shard_file(stem, '.json')}: tokenised by another tokenizer "
                f"({info.tokenizer_sha256[:16]}.., but the corpus has {manifest.tokenizer_sha256[:16]}..); "
                "prepare the corpus again"
            )
        check_shard(stem, info, verify=verify)
        shards.append((stem, info))
    stream = TokenStream(source.name, source.weight, shards)
    if (stream.n_tokens, stream.n_documents) != (summary.n_tokens, summary.n_documents):
        raise DataError(
            f"{directory}: the shards of source {source.name!r} have {stream.n_tokens} tokens where the "
            f"manifest says {summary.n_tokens}; the corpus was mixed with another, prepare it again"
        )
    return stream
