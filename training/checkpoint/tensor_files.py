"""The tensor files of a checkpoint: safetensors, written as a stream and read in slices.

The safetensors library reads them, but we write them ourselves, for two reasons: each byte is hashed on its
way to the disk, so no file is read again for its checksum, and a test can stop the process between any two
writes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnout.training.checkpoint.durable_io import Buffer, Disk
from turnout.training.checkpoint.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    naming_unreadable,
    rank_file,
)
from turnout.training.checkpoint.resharding import Shard, overlaps
from turnout.training.checkpoint.safetensors_stream import CHUNK_BYTES, Stored, safetensors_chunks
from turnout.training.errors import CheckpointError, printable


def key_of(kind: str, name: str) -> str:
    """Return the key of a parameter's shard in a rank's file. A rank holds at most one shard of each."""
    return f"{kind}/{name}"


def write_tensors(disk: Disk, path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write fp32 host tensors of any shape as a safetensors file and flush it; return its size and SHA-256.

    Raises OSError.
    """
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    # Not a lambda, which would bind the last tensor only.
    stored = {key: Stored(tuple(t.shape), t.dtype, partial(iter, [t])) for key, t in tensors.items()}
    return write_stored(disk, path, stored)


def write_stored(disk: Disk, path: Path, stored: Mapping[str, Stored]) -> FileEntry:
    """Write tensors like write_tensors, but read each one only when it is about to be written."""
    digest, n_bytes = hashlib.sha256(), 0

    def hashed() -> Iterator[Buffer]:
        nonlocal n_bytes
        for chunk in safetensors_chunks(stored):
            digest.update(chunk)
            n_bytes += len(chunk)
            yield chunk

    disk.write(path, hashed())
    return FileEntry(n_bytes=n_bytes, sha256=digest.hexdigest())


def write_bytes(disk: Disk, path: Path, content: bytes) -> FileEntry:
    """Write a small file and flush it; return its size and SHA-256. Raises OSError."""
    disk.write(path, [content])
    return FileEntry(n_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class TensorReader:
    """Reads slices of the tensors of one checkpoint. Each file is mapped once; no element is read twice."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._files: dict[str, Any] = {}

    def read_shard(self, name: str, kind: str, wanted: Shard, out: Tensor) -> None:
        """Fill out [wanted.numel] with a shard of a parameter, from whatever shards were saved.

        Raises CheckpointError if the checkpoint does not hold all of it.
        """
        n_read = 0
        for rank, shard in self._entry(name).held_shards():
            for overlap in overlaps(shard, wanted):
                source = self._read(rank_file(rank), key_of(kind, name), overlap.read, shard.numel)
                overlap.copy(source, out)
                n_read += overlap.numel
        if n_read != wanted.numel:
            raise CheckpointError(f"{self.directory}: holds {n_read} of {wanted.numel} elements of {name}")

    def read_named(self, file: str, key: str, out: Tensor) -> None:
        """Fill out, of any shape, with the whole tensor of that shape in a file. Raises CheckpointError."""
        out.copy_(self._read(file, key, (0, out.numel()), out.numel()).view_as(out))

    def check_header(self, file: str) -> None:
        """Check that a file is safetensors and holds each tensor that the manifest lists for it.

        Raises CheckpointError.
        """
        self._open(file)
        for name, numel in self._shards_by_file.get(file, ()):
            for kind in self.manifest.kinds:
                self._read(file, key_of(kind, name), (0, 0), numel)

    def chunks(self, name: str, kind: str) -> Iterator[Tensor]:
        """Yield each element of a parameter once, in any order, in flat tensors of at most CHUNK_BYTES."""
        n = CHUNK_BYTES // 4
        for rank, shard in self._entry(name).held_shards():
            for start in range(0, shard.numel, n):
                elements = (start, min(start + n, shard.numel))
                yield self._read(rank_file(rank), key_of(kind, name), elements, shard.numel)

    @cached_property
    def _shards_by_file(self) -> dict[str, list[tuple[str, int]]]:
        """Return (name, numel) of each shard, by the file that holds it."""
        found: dict[str, list[tuple[str, int]]] = {}
        for name, entry in self.manifest.tensors.items():
            for rank, shard in entry.held_shards():
                found.setdefault(rank_file(rank), []).append((name, shard.numel))
        return found

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.directory}: has no parameter {name}; it was saved by another model")
        return self.manifest.tensors[name]

    def _read(self, file: str, key: str, elements: tuple[int, int], numel: int) -> Tensor:
        path, opened = self.directory / file, self._open(file)
        try:
            stored = opened.get_slice(key)
            if stored.get_dtype() != "F32" or stored.get_shape() != [numel]:
                raise CheckpointError(
                    f"{path}: {key} is {stored.get_dtype()} {stored.get_shape()}, but the manifest says "
                    f"F32 [{numel}]"
                )
            values: Tensor = stored[elements[0] : elements[1]]
            return values
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path}: {key}: {printable(str(err))}") from err

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            if file not in self._files:
                with naming_unreadable(path):
                    self._files[file] = safe_open(path, framework="pt", device="cpu")
            return self._files[file]
        except SafetensorError as err:
            raise CheckpointError(f"{path}: {printable(str(err))}") from err
