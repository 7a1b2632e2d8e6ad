"""An export exists completely and proven, or not at all."""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from turnout.training.checkpoint.durable_io import Disk
from turnout.training.errors import ConfigError

# Beside what is being written lies a file that its writer holds a lock on: a file, and not the directory,
# because NFS tells its server of locks of files only.
LOCK = ".lock"


def check_free(out: Path, option: str = "--out") -> None:
    """Raise ConfigError where something is already at the place of an export."""
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{option} {out} is there already; name a new directory, or remove this one yourself"
        )


def publish_export(out: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Write into a directory beside out, check what was written, and only then give it its name.

    Whatever write or check raises, nothing is left; what a killed export of the same name left is swept.
    Raises ConfigError where out is there already.
    """
    check_free(out)
    _sweep(out)
    disk = Disk()
    with _staged(out) as staged:
        write(staged)
        check(staged)
        disk.flush_directory(staged)
        check_free(out)  # another export may have been faster
        disk.rename(staged, out)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Give an empty directory of this process's own, which is gone afterwards unless it was renamed."""
    path = out.with_name(f"{out.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + LOCK)
    with lock.open("x") as file:
        _lock(file.fileno())
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            lock.unlink()


def _sweep(out: Path) -> None:
    """Remove what exports of this name left whose processes are gone."""
    for lock in out.parent.glob(f"{out.name}.*.tmp{LOCK}"):
        # Another sweep may be at it.
        with suppress(FileNotFoundError), lock.open("r+") as file:
            if _lock(file.fileno()):
                # Which leaves a link, and what it leads to.
                shutil.rmtree(lock.with_name(lock.name.removesuffix(LOCK)), ignore_errors=True)
                lock.unlink()


def _lock(file: int) -> bool:
    """Return whether the lock was free, and take it. Where there are no locks, none is ever free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
