"""Token shards in the Megatron `.bin/.idx` layout, each committed by a JSON file written last.

NAME.bin is the tokens of the documents, one after another. NAME.idx is a header, the int32 length and the
int64 byte offset of every sequence, and the int64 numbers of the sequences at which documents start.
NAME.json records sizes, hashes and the shard's range in its source: a shard without it does not exist.
"""

import hashlib
import json
import os
import struct
from array import array
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from turnout.data.errors import DataError
from turnout.data.files import commit, sha256_of, write_atomically

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
# magic, version, dtype code, number of sequences, length of the document index
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
FORMAT_VERSION = 1
Verify = Literal["checksum", "size"]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """The content of NAME.json."""

    format_version: int
    split: str
    source: str
    dtype: str
    n_documents: int
    n_tokens: int
    n_text_bytes: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    tokenizer_sha256: str
    # Made of documents [first_document, end_document) of the source; the other split has the rest of them.
    first_document: int
    end_document: int
    text_sha256: str  # running hash of the source's documents [0, end_document)


def shard_file(stem: Path, suffix: str) -> Path:
    # Not with_suffix: a source's name may hold a dot.
    return stem.with_name(stem.name + suffix)


def dtype_for(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


class ShardWriter:
    """Write one shard. Before `close`, no file has its final name."""

    def __init__(self, stem: Path, *, vocab_size: int) -> None:
        self.stem, self.dtype, self._vocab_size = stem, dtype_for(vocab_size), vocab_size
        self.n_tokens = self.n_text_bytes = 0
        self._lengths = array("i")
        self._bin_hash = hashlib.sha256()
        self._bin_tmp, self._idx_tmp = shard_file(stem, ".bin.tmp"), shard_file(stem, ".idx.tmp")
        self._bin = self._bin_tmp.open("wb", buffering=1 << 20)

    def append(self, ids: np.ndarray, *, n_text_bytes: int) -> None:
        """Add one document, of at least one id."""
        assert ids.size and ids.min() >= 0 and ids.max() < self._vocab_size, "ids outside the vocabulary"
        content = np.ascontiguousarray(ids, dtype=self.dtype).tobytes()
        self._bin.write(content)
        self._bin_hash.update(content)
        self._lengths.append(ids.size)
        self.n_tokens += ids.size
        self.n_text_bytes += n_text_bytes

    def close(
        self,
        *,
        split: str,
        source: str,
        tokenizer_sha256: str,
        first_document: int,
        end_document: int,
        text_sha256: str,
    ) -> ShardInfo:
        """Flush and rename both files, then write the JSON that makes the shard exist."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        index = self._index()
        with self._idx_tmp.open("wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        info = ShardInfo(
            format_version=FORMAT_VERSION,
            split=split,
            source=source,
            dtype=self.dtype.name,
            n_documents=len(self._lengths),
            n_tokens=self.n_tokens,
            n_text_bytes=self.n_text_bytes,
            bin_bytes=self.n_tokens * self.dtype.itemsize,
            bin_sha256=self._bin_hash.hexdigest(),
            idx_bytes=len(index),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            tokenizer_sha256=tokenizer_sha256,
            first_document=first_document,
            end_document=end_document,
            text_sha256=text_sha256,
        )
        commit(self._bin_tmp, shard_file(self.stem, ".bin"))
        commit(self._idx_tmp, shard_file(self.stem, ".idx"))
        content = json.dumps(asdict(info), indent=1).encode()
        write_atomically(shard_file(self.stem, ".json"), content)
        return info

    def abort(self) -> None:
        """Remove the partial files; the disk may be full, so nothing is flushed."""
        self._bin_tmp.unlink(missing_ok=True)
        self._idx_tmp.unlink(missing_ok=True)
        try:
            self._bin.close()
        except OSError:
            # Closing writes what is buffered and can fail like the write before it. The file is gone anyway.
            return

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1] * np.int64(self.dtype.itemsize), out=pointers[1:])
        document_index = np.arange(len(lengths) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, INDEX_VERSION, DTYPE_CODES[self.dtype], len(lengths), len(document_index))
        return header + lengths.tobytes() + pointers.tobytes() + document_index.tobytes()


class Shard:
    """Read one shard through memory maps. Opening checks that its parts fit together, not its hashes."""

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        bin_path, idx_path = shard_file(stem, ".bin"), shard_file(stem, ".idx")
        index = np.memmap(idx_path, dtype=np.uint8, mode="r") if _size(idx_path) else np.empty(0, np.uint8)
        if len(index) < HEADER.size:
            raise _truncated(idx_path, HEADER.size, len(index))
        magic, version, code, n_sequences, n_index = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC or version != INDEX_VERSION or code not in DTYPES:
            raise DataError(
                f"{idx_path}: not a Megatron index that can be read (magic {magic!r}, version {version}, "
                f"dtype code {code}); expected {MAGIC!r}, version {INDEX_VERSION}, "
                f"dtype code in {sorted(DTYPES)}"
            )
        expected = HEADER.size + 12 * n_sequences + 8 * n_index
        if len(index) != expected:
            raise _truncated(idx_path, expected, len(index))
        self.dtype = DTYPES[code]
        pointers_at = HEADER.size + 4 * n_sequences
        documents_at = pointers_at + 8 * n_sequences
        lengths = index[HEADER.size : pointers_at].view("<i4")
        pointers = index[pointers_at:documents_at].view("<i8")
        self._pointers, self._document_index = pointers, index[documents_at:].view("<i8")
        self.n_documents = n_index - 1
        self.n_tokens = int(lengths.sum(dtype=np.int64))
        _check_index(idx_path, lengths, pointers, self._document_index, self.dtype.itemsize)
        if _size(bin_path) != self.n_tokens * self.dtype.itemsize:
            raise _truncated(bin_path, self.n_tokens * self.dtype.itemsize, _size(bin_path))
        self.tokens: np.ndarray = (
            np.memmap(bin_path, dtype=self.dtype, mode="r") if self.n_tokens else np.empty(0, self.dtype)
        )

    @cached_property
    def starts(self) -> np.ndarray:
        """Token offset at which each document starts, [n_documents] int64."""
        ends = np.append(self._pointers // self.dtype.itemsize, self.n_tokens)
        starts: np.ndarray = ends[self._document_index[:-1]]
        return starts

    def document(self, number: int) -> np.ndarray:
        end = self.starts[number + 1] if number + 1 < self.n_documents else self.n_tokens
        return self.tokens[self.starts[number] : end]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as err:
        raise DataError(f"{path}: the file is missing; prepare the corpus again or copy it whole") from err


def _truncated(path: Path, expected: int, actual: int) -> DataError:
    return DataError(
        f"{path}: {actual} bytes where {expected} were expected; the file was cut or replaced, copy it again"
    )


def _check_index(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, document_index: np.ndarray, itemsize: int
) -> None:
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    starts = ends - lengths * np.int64(itemsize)
    wrong = np.flatnonzero((lengths < 0) | (pointers != starts))
    if len(wrong):
        number = int(wrong[0])
        raise DataError(
            f"{path}: sequence {number} has length {lengths[number]} and offset {pointers[number]} where "
            f"{starts[number]} follows from the sequences before it; the index is damaged, copy it again"
        )
    whole = len(document_index) > 0 and document_index[0] == 0 and document_index[-1] == len(lengths)
    if not whole or (np.diff(document_index) < 0).any():
        raise DataError(
            f"{path}: its document index does not cover sequences 0..{len(lengths)}; copy the file again"
        )


def read_shard_info(stem: Path) -> ShardInfo:
    """Read NAME.json. Raises DataError if it is damaged, or missing: then the shard does not exist."""
    path = shard_file(stem, ".json")
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise DataError(
            f"{path}: the file is missing, so the shard does not exist; prepare the corpus again"
        ) from err
    except ValueError as err:
        raise DataError(f"{path}: not JSON ({err}); copy the file again") from err
    expected = {field.name for field in fields(ShardInfo)}
    if (
        not isinstance(values, dict)
        or values.get("format_version") != FORMAT_VERSION
        or values.keys() != expected
    ):
        raise DataError(
            f"{path}: not a shard description of format {FORMAT_VERSION}; prepare the corpus again"
        )
    return ShardInfo(**values)


def check_shard(stem: Path, info: ShardInfo, *, verify: Verify) -> None:
    """Compare the files of a shard with its JSON: sizes always, SHA-256 when asked. Raises DataError."""
    recorded = ((".bin", info.bin_bytes, info.bin_sha256), (".idx", info.idx_bytes, info.idx_sha256))
    for suffix, n_bytes, digest in recorded:
        path = shard_file(stem, suffix)
        if _size(path) != n_bytes:
            raise _truncated(path, n_bytes, _size(path))
        if verify == "checksum" and (actual := sha256_of(path)) != digest:
            raise DataError(
                f"{path}: SHA-256 {actual[:16]}.. where {digest[:16]}.. was recorded; "
                "the file was altered, copy it again"
            )
