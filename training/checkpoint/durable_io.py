"""The file operations of a save, each of them durable: on the disk when the call returns.

Every operation calls Disk.boundary first, which does nothing here. Tests override it to kill a rank at each
boundary in turn, so a new boundary is covered automatically.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | memoryview


class Disk:
    """Writes and renames files so that a power loss after the call does not undo it."""

    def boundary(self, name: str, path: Path) -> None:
        """Mark a point at which a process may die."""

    def make_directory(self, path: Path) -> None:
        """Make a directory, unless another rank has made it."""
        self.boundary("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        """Write a new file and flush it to the disk.

        Raises OSError, which names the file; a half-written file stays.
        """
        self.boundary("create", path)
        try:
            with path.open("xb") as file:
                for chunk in chunks:
                    self.boundary("write", path)
                    file.write(chunk)
                self.boundary("fsync", path)
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            err.filename = err.filename or str(path)  # a failing write reports only the error number
            raise

    def flush_directory(self, path: Path) -> None:
        """Flush the entries of a directory."""
        self.boundary("fsync", path)
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system; atomic, and durable once the call returns."""
        self.boundary("rename", target)
        source.replace(target)
        self.flush_directory(target.parent)

    def remove(self, path: Path) -> None:
        """Remove a directory that, by its name, nobody reads."""
        self.boundary("remove", path)
        shutil.rmtree(path)

    def discard(self, path: Path) -> None:
        """Remove what a failed save has written. Ignores errors: what stays has no checkpoint's name."""
        shutil.rmtree(path, ignore_errors=True)
