"""What a checkpoint asks of the file system, one call for each boundary at which a process may die.

Every call of a save goes through `at`, which does nothing here. The tests put a rank to death in it, at each
boundary in turn, so a boundary that is added here is tested without another word.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | memoryview


class Disk:
    """Writes files that are on the disk when a call returns, and renames that stay after a power loss."""

    def boundary(self, name: str, path: Path) -> None:
        """Stand before a boundary."""

    def make_directory(self, path: Path) -> None:
        """Make a directory, unless another rank was first."""
        self.boundary("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        """Write a new file and flush it to the disk. Raises OSError, which names the file; what was written
        then stays.
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
            err.filename = err.filename or str(path)  # a write that fails knows only a number
            raise

    def flush_directory(self, path: Path) -> None:
        """Flush the names in a directory."""
        self.boundary("fsync", path)
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system: atomic, and lasting once the call returns."""
        self.boundary("rename", target)
        source.replace(target)
        self.flush_directory(target.parent)

    def remove(self, path: Path) -> None:
        """Remove a directory whose name says that nobody reads it."""
        self.boundary("remove", path)
        shutil.rmtree(path)

    def discard(self, path: Path) -> None:
        """Remove what was written of a checkpoint that failed; what cannot be removed has no name anyway."""
        shutil.rmtree(path, ignore_errors=True)
