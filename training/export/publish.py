"""An export exists completely and proven, or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.disk import Disk
from training.errors import ConfigError


def check_free(out: Path, option: str = "--out") -> None:
    """Raise ConfigError where something is already at the place of an export."""
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{option} {out} is there already; name a new directory, or remove this one yourself"
        )


def publish_export(out: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Write into a directory beside out, check what was written, and only then give it its name.

    Whatever write or check raises, nothing is left; what a killed export left is swept by the next one of
    the same name. Raises ConfigError where out is there already, or is being written.
    """
    check_free(out)
    disk = Disk()
    with _staged(out) as staged:
        write(staged)
        check(staged)
        disk.flush_directory(staged)
        check_free(out)  # something else may have been faster
        disk.rename(staged, out)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Give an empty directory that only this process writes: who dies lets go of the lock."""
    path = out.with_name(f"{out.name}.tmp")
    path.mkdir(parents=True, exist_ok=True)
    directory = os.open(path, os.O_RDONLY)
    try:
        _lock(directory, path, out)
        for left in path.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(directory)


def _lock(directory: int, path: Path, out: Path) -> None:
    """Raise ConfigError where another process has the directory, or had it and has just named it out."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_here = path.exists() and os.path.samestat(path.stat(), os.fstat(directory))
    except BlockingIOError:
        is_here = False
    if not is_here:
        raise ConfigError(f"{out} is being written by another process; wait for it, or name another place")
