"""Two checks that commands share: what a path names (run, checkpoint or model), and that it is intact.

Verifying reads every byte and compares it with the manifest's checksums. Nothing is loaded or changed here.
"""

import time
from collections.abc import Callable
from pathlib import Path

from turnout.launch.console import LiveBar, format_size
from turnout.training.checkpoint.directory import (
    CHECKPOINTS,
    list_checkpoints,
    no_intact_message,
    nominal_step,
    read_checkpoint,
    verify_files,
)
from turnout.training.checkpoint.manifest import CONFIG_FILE, MANIFEST
from turnout.training.errors import CheckpointError, ConfigError, UnknownVersionError
from turnout.training.export.hf_config import is_hf_directory


def is_checkpoint(directory: Path) -> bool:
    """Return whether a path names a single checkpoint and not a run. It may be damaged or absent."""
    try:
        return nominal_step(directory) >= 0
    except CheckpointError:
        return (directory / MANIFEST).exists()


def check_run_dir(path: Path) -> None:
    """Check that a path is a run directory. Raises ConfigError if it is not."""
    is_run = (path / CHECKPOINTS).is_dir() or (path / CONFIG_FILE).is_file()
    if is_run and not is_checkpoint(path):
        return
    raise ConfigError(f"{path} is not a run directory; {_way_out(path)}")


def check_is_model(path: Path) -> None:
    """Raise ConfigError if a path is neither a run, a checkpoint nor an exported model. Reads no tensor."""
    if not is_hf_directory(path) and not is_checkpoint(path):
        check_run_dir(path)


def _way_out(path: Path) -> str:
    if is_checkpoint(path) and path.parent.name == CHECKPOINTS:
        return f"name the run that has this checkpoint, {path.parent.parent}"
    if path.name == CHECKPOINTS and path.is_dir():
        return f"name the directory above it, {path.parent}"
    return f"name the directory given to --run-dir, with {CONFIG_FILE} and {CHECKPOINTS}/"


def verify_with_bar(path: Path) -> str:
    """Verify a checkpoint behind a progress bar, and return one line on the result.

    Raises CheckpointError if a file is damaged or missing.
    """
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


def newest_intact(run_dir: Path, report: Callable[[str], None]) -> Path:
    """Return a run's newest checkpoint that passes verification.

    Raises CheckpointError if none does, or if a later release wrote the newest one.


    report: receives one line per checkpoint that was read, intact or damaged
    """
    faults: list[str] = []
    for path in list_checkpoints(run_dir):
        try:
            report(verify_with_bar(path))
            return path
        except UnknownVersionError:  # neither damaged, nor to be replaced by an older one in silence
            raise
        except CheckpointError as err:
            faults.append(str(err))
            report(f"damaged: {err}")
    raise CheckpointError(no_intact_message(run_dir, faults))


def no_checkpoint_yet(run_dir: Path) -> str:
    return f"{run_dir} has no checkpoint yet"
