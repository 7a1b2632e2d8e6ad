"""An export exists completely and proven, or not at all."""

import os
import shutil
from collections.abc import Callable
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

    Whatever write or check raises, nothing is left. Raises ConfigError where out is there already.
    """
    check_free(out)
    disk, staged = Disk(), out.with_name(f"{out.name}.{os.getpid()}.tmp")
    staged.mkdir(parents=True)
    try:
        write(staged)
        disk.flush_directory(staged)
        check(staged)
        check_free(out)  # another export may have been faster
        disk.rename(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
