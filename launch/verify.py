"""Verification of checkpoints, byte by byte, and checks that a path names a run, a checkpoint or a model."""

import time
from collections.abc import Callable
from pathlib import Path

from turnout.launch.console import LiveBar, format_size
from turnout.training.checkpoint.directory import (
    CHECKPOINTS,
    list_checkpoints,
    nominal_step,
    none_intact,
    read_checkpoint,
    verify_files,
)
from turnout.training.checkpoint.manifest import CONFIG_FILE, MANIFEST
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.export.hf_files import is_hf_directory


def verified(path: Path) -> str:
    """Read every byte of a checkpoint and say so. Raises CheckpointError."""
    start_s, n_read = time.monotonic(), 0
    manifest = read_checkpoint(path)
    bar = LiveBar(f"verifying {path.name}", manifest.n_bytes)

    def on_read(n_bytes: int) -> None:
        nonlocal n_read
        n_read += n_bytes
        bar.update(n_read)

    try:
        verify_files(path, manifest, on_read=on_read)
    finally:
        bar.close()
    mb_per_s = n_read / 1e6 / max(1e-3, time.monotonic() - start_s)
    return f"{path}: intact, {format_size(n_read)} in {len(manifest.files)} files, {mb_per_s:,.0f} MB/s"


def newest_intact(run_dir: Path, say: Callable[[str], None]) -> Path:
    """Return the newest checkpoint whose every byte is right. Raises CheckpointError where there is none."""
    faults: list[str] = []
    for path in list_checkpoints(run_dir):
        try:
            say(verified(path))
            return path
        except CheckpointError as err:
            faults.append(str(err))
            say(f"damaged: {err}")
    raise CheckpointError(none_intact(run_dir, faults))


def is_checkpoint(directory: Path) -> bool:
    """Return whether a path names one checkpoint, and not a run. It need not be intact, or there."""
    try:
        return nominal_step(directory) >= 0
    except CheckpointError:
        return (directory / MANIFEST).exists()


def check_run_dir(path: Path) -> None:
    """Raise ConfigError where the path is no run directory."""
    is_run = (path / CHECKPOINTS).is_dir() or (path / CONFIG_FILE).is_file()
    if is_run and not is_checkpoint(path):
        return
    raise ConfigError(f"{path} is not a run directory; {_way_out(path)}")


def check_is_model(path: Path) -> None:
    """Raise ConfigError where a path is no run, no checkpoint and no exported model. Reads no tensor."""
    if not is_hf_directory(path) and not is_checkpoint(path):
        check_run_dir(path)


def _way_out(path: Path) -> str:
    if is_checkpoint(path) and path.parent.name == CHECKPOINTS:
        return f"name the run that has this checkpoint, {path.parent.parent}"
    if path.name == CHECKPOINTS and path.is_dir():
        return f"name the directory above it, {path.parent}"
    return f"name what --run-dir named, a directory with {CONFIG_FILE} and {CHECKPOINTS}/"


def no_checkpoint_yet(run_dir: Path) -> str:
    return f"{run_dir} has no checkpoint yet"
