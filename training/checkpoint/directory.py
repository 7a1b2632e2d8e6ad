"""The checkpoints of a run on disk: naming, listing, verifying, publishing and removing them.

One process, no tensors. A checkpoint is written as step-00001000.<token>.tmp, flushed, and renamed to
step-00001000, so a directory with such a name is complete. A directory whose name ends in .tmp is never used.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from turnout.data.files import write_atomically
from turnout.moe.config import ModelConfig
from turnout.moe.flops import n_params
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import Manifest, check_file, read_manifest
from turnout.training.errors import CheckpointError, UnknownVersionError

CHECKPOINTS = "checkpoints"
POINTER_FILE = "latest"  # for other tools; nothing in Turnout reads it
_NAME = re.compile(r"step-([0-9]{8,})")
TENSORS = ".safetensors"
_TMP, _DAMAGED = ".tmp", ".damaged"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def unfinished_path(run_dir: Path, step: int, token: str) -> Path:
    """Return where a checkpoint is written before it gets its name. Each attempt has its own path."""
    final = checkpoint_path(run_dir, step)
    return final.with_name(f"{final.name}.{token}{_TMP}")


def step_of(path: Path) -> int:
    """Return the step of a checkpoint directory. Raises CheckpointError if it is not named like one."""
    match = _NAME.fullmatch(path.name) or _NAME.fullmatch(path.resolve().name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint; a checkpoint has a name such as step-00001000")
    return int(match[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoints, newest first. None of them has been verified."""
    directory = run_dir / CHECKPOINTS
    if not directory.is_dir():
        return []
    named = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=step_of, reverse=True)


def list_set_aside(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were renamed because they were damaged, newest first."""
    return _with_ending(run_dir, _DAMAGED)


def list_unfinished(run_dir: Path) -> list[Path]:
    """Return the directories being written, or left half-written or half-removed, newest first."""
    return _with_ending(run_dir, _TMP)


def nominal_step(path: Path) -> int:
    """Return the step in the name of a checkpoint, intact, damaged or unfinished."""
    return step_of(path.with_name(path.name.partition(".")[0]))


def _with_ending(run_dir: Path, ending: str) -> list[Path]:
    found = (run_dir / CHECKPOINTS).glob(f"step-*{ending}")
    named = [path for path in found if _NAME.fullmatch(path.name.partition(".")[0])]
    return sorted(named, key=nominal_step, reverse=True)


def read_checkpoint(directory: Path) -> Manifest:
    """Check a checkpoint, except its tensors, and return its manifest. Raises CheckpointError."""
    step = step_of(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint")
    manifest = read_manifest(directory)
    if manifest.state.step != step:
        raise CheckpointError(
            f"{directory}: holds step {manifest.state.step}; it was renamed, or copied over another"
        )
    for name, entry in manifest.files.items():
        if not name.endswith(TENSORS):
            check_file(directory / name, entry)
    return manifest


def verify_files(
    directory: Path,
    manifest: Manifest,
    part: int = 0,
    n_parts: int = 1,
    on_read: Callable[[int], None] | None = None,
) -> None:
    """Read every n_parts-th file, from number `part` on, and compare it with the manifest.

    on_read: called with the number of bytes of each chunk that was read. Raises CheckpointError.
    """
    # Imported here because torch takes a second to import, and listing checkpoints does not need it.
    from turnout.training.checkpoint.tensor_files import TensorReader

    reader = TensorReader(directory, manifest)
    for name in sorted(manifest.files)[part::n_parts]:
        check_file(directory / name, manifest.files[name], on_read)
        if name.endswith(TENSORS):
            reader.check_header(name)


def verify_checkpoint(directory: Path, on_read: Callable[[int], None] | None = None) -> Manifest:
    """Read every byte of a checkpoint; return its manifest. Raises CheckpointError naming a damaged file."""
    manifest = read_checkpoint(directory)
    verify_files(directory, manifest, on_read=on_read)
    return manifest


def newest_readable(run_dir: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint whose manifest and file sizes are right; None if the run has none.

    Raises CheckpointError if there are checkpoints, but none can be read.
    """
    faults = []
    for path in list_checkpoints(run_dir):
        try:
            return path, read_checkpoint(path)
        except UnknownVersionError:  # an older one would lose the steps that a later release has taken
            raise
        except CheckpointError as err:
            faults.append(str(err))
    # A run with only damaged checkpoints must not start again from the first step.
    faults += [f"{path}: set aside as damaged" for path in list_set_aside(run_dir)]
    if faults:
        raise CheckpointError(no_intact_message(run_dir, faults))
    return None


def no_intact_message(run_dir: Path, faults: list[str]) -> str:
    """Return the error message for a run that has no checkpoint left to resume from."""
    return (
        f"{run_dir / CHECKPOINTS}: no intact checkpoint: {'; '.join(faults)}. Put a good copy there, or move "
        f"{CHECKPOINTS}/ away to start from the first step"
    )


def set_aside(directory: Path, disk: Disk) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; return its new path."""
    aside = directory.with_name(directory.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    disk.rename(directory, aside)
    return aside


def sweep_unfinished(run_dir: Path) -> None:
    """Remove what earlier attempts left half-written or half-removed."""
    for path in (run_dir / CHECKPOINTS).glob(f"*{_TMP}"):
        # A rank of an earlier attempt may still write there; the next attempt removes what it adds.
        shutil.rmtree(path, ignore_errors=True)


def publish(unfinished: Path, run_dir: Path, step: int, disk: Disk) -> Path:
    """Give a flushed checkpoint its name, and let the pointer file name it; return its path."""
    final = checkpoint_path(run_dir, step)
    disk.flush_directory(unfinished)
    # The run may have saved this step before, and then returned to an earlier one.
    replaced = _unname(final, disk) if final.exists() else None
    disk.rename(unfinished, final)
    with suppress(OSError):  # the checkpoint is safe; the next attempt removes what is left
        disk.boundary("pointer", final.parent / POINTER_FILE)
        write_atomically(final.parent / POINTER_FILE, f"{final.name}\n".encode())
        if replaced is not None:
            disk.remove(replaced)
    return final


def list_old(run_dir: Path, *, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Return the checkpoints to remove, newest first.

    These are all but the newest keep_last and those at multiples of keep_every_steps.
    """
    too_many = list_checkpoints(run_dir)[keep_last:]
    return [p for p in too_many if keep_every_steps is None or step_of(p) % keep_every_steps]


def prune(old: Iterable[Path], disk: Disk) -> list[Path]:
    """Remove these checkpoints; return those that this call removed."""
    removed = []
    for path in old:
        try:
            _retire(path, disk)
        except FileNotFoundError:  # the run or another command removed it first
            continue
        removed.append(path)
    return removed


def _retire(directory: Path, disk: Disk) -> None:
    """Rename a checkpoint, then remove it, so that a half-removed one is never taken for a checkpoint."""
    disk.remove(_unname(directory, disk))


def _unname(directory: Path, disk: Disk) -> Path:
    nameless = directory.with_name(f"{directory.name}.{os.getpid()}.old{_TMP}")
    disk.rename(directory, nameless)
    return nameless


def checkpoint_bytes(cfg: ModelConfig) -> int:
    """Return the bytes of one checkpoint: fp32 master weights and AdamW's two moments, for any layout."""
    return 12 * n_params(cfg)
