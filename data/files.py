"""Bytes on disk: decompression that notices damage, and files that appear complete or not at all.

Nothing here knows what the bytes mean.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from turnout.data.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
CHUNK_BYTES = 1 << 20


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in order. Raises DataError for a damaged or truncated file."""
    try:
        if path.suffix == ".zst":
            yield from _read_zstd(path)
        elif path.suffix == ".gz":
            with gzip.open(path) as gz_file:
                while chunk := gz_file.read(CHUNK_BYTES):
                    yield chunk
        elif path.suffix == ".bz2":
            with bz2.open(path) as bz2_file:
                while chunk := bz2_file.read(CHUNK_BYTES):
                    yield chunk
        elif path.suffix == ".xz":
            with lzma.open(path) as xz_file:
                while chunk := xz_file.read(CHUNK_BYTES):
                    yield chunk
        else:
            with path.open("rb") as plain_file:
                while chunk := plain_file.read(CHUNK_BYTES):
                    yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as err:
        raise _damaged(path, err) from err
    except OSError as err:
        # bz2 reports a bad stream as an OSError without an errno; one with an errno comes from the disk.
        if err.errno is not None:
            raise
        raise _damaged(path, err) from err


def _damaged(path: Path, err: Exception) -> DataError:
    return DataError(f"{path}: the {path.suffix} data is damaged or cut short ({err}); copy the file again")


def _read_zstd(path: Path) -> Iterator[bytes]:
    """Decompress every frame of a .zst file, and raise EOFError if the last one is incomplete.

    zstandard's own file object returns what it has, without an error, when the input ends inside a frame.
    """
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside_frame = False
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            while chunk:
                text = frame.decompress(chunk)
                inside_frame, chunk = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                if text:
                    yield text
    if inside_frame:
        raise EOFError("the file ends inside a frame")


def read_bytes(path: Path) -> bytes:
    """Return the whole decompressed content."""
    return b"".join(read_chunks(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield decompressed lines, split at newlines only and without them."""
    rest: list[bytes] = []
    for chunk in read_chunks(path):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield from b"".join([*rest, head]).split(b"\n")
            rest = []
        if tail:
            rest.append(tail)
    if rest:
        yield b"".join(rest)


def sha256_of(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file. on_read: called with the number of bytes of each chunk read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_read is not None:
                on_read(len(chunk))
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that a reader finds all of it or nothing."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as err:
        tmp.unlink(missing_ok=True)
        if isinstance(err, OSError):
            err.filename = err.filename or str(path)  # the error of a failed write names no file
        raise
    commit(tmp, path)


def commit(tmp: Path, path: Path) -> None:
    """Rename a flushed file to its final name, and flush the directory that holds the name."""
    tmp.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
