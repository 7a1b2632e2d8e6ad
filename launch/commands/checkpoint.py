"""`turnout checkpoint`: list, verify, show and prune the checkpoints of a run.

Only prune writes. A checkpoint may come from a stranger, so its texts are printed through `printable`.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from turnout.launch.arguments import check_at_least
from turnout.launch.console import format_size
from turnout.launch.verify import (
    check_run_dir,
    is_checkpoint,
    newest_intact,
    no_checkpoint_yet,
    verify_with_bar,
)
from turnout.training.checkpoint.directory import (
    list_checkpoints,
    list_old,
    list_set_aside,
    list_unfinished,
    newest_readable,
    nominal_step,
    prune,
    read_checkpoint,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import CONFIG_FILE, MANIFEST, Manifest, TrainingState
from turnout.training.config.optim import MASTER
from turnout.training.errors import CheckpointError, UnknownVersionError, printable

if TYPE_CHECKING:
    from turnout.training.checkpoint.tensor_files import TensorReader

COLUMNS = ("step", "size", "saved layout", "tokens seen", "written", "state")


def list_saved(run_dir: Path) -> None:
    """Print a table of a run's checkpoints, newest first, without reading their tensors."""
    check_run_dir(run_dir)
    found = [*list_checkpoints(run_dir), *list_set_aside(run_dir), *list_unfinished(run_dir)]
    if not found:
        print(no_checkpoint_yet(run_dir))
        return
    rows = [COLUMNS, *map(_row, sorted(found, key=nominal_step, reverse=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print("tensors were not read; to read every byte: turnout checkpoint verify", run_dir)


def _row(path: Path) -> tuple[str, ...]:
    """Return one row of COLUMNS. The run may remove or finish the directory meanwhile."""
    layout = tokens = "-"
    if path.suffix == ".tmp":
        state = "unfinished"
    elif path.suffix == ".damaged":
        state = "set aside as damaged"
    else:
        try:
            manifest = read_checkpoint(path)
            layout, tokens = _layout(manifest), f"{manifest.state.tokens_seen:,}"
            state = "readable"
        except UnknownVersionError as err:
            state = f"not read: {err}"
        except (CheckpointError, OSError) as err:
            state = f"damaged: {err}"
    return str(nominal_step(path)), format_size(_bytes_in(path)), layout, tokens, _written_at(path), state


def verify_all(directory: Path) -> None:
    """Verify a checkpoint, or all checkpoints of a run. Raises CheckpointError if one is damaged."""
    is_one = is_checkpoint(directory)
    if not is_one:
        check_run_dir(directory)
    paths = [directory] if is_one else list_checkpoints(directory)
    if not paths:
        raise CheckpointError(f"{no_checkpoint_yet(directory)}, so there is nothing to verify")
    faults, intact = [], []
    for path in paths:
        try:
            print(verify_with_bar(path), flush=True)
            intact.append(path)
        except CheckpointError as err:
            faults.append(str(err))
    if not faults:
        return
    newest = f"; the newest intact one is {intact[0]}" if intact else "; put a good copy there"
    count = "" if is_one else f"{len(faults)} of {len(paths)} checkpoints are damaged: "
    raise CheckpointError(count + "; ".join(faults) + newest)


def show_contents(directory: Path, *, has_tensors: bool) -> None:
    """Print what a checkpoint holds; for a run, its newest readable one.

    has_tensors: also read the weights, and print their statistics
    """
    # Imported here, as below, because torch takes a second to import, and only this command needs it.
    from turnout.training.checkpoint.tensor_files import TensorReader

    path, manifest = _find_readable(directory)
    for quantity, value in [("checkpoint", str(path)), *_summary(path, manifest)]:
        print(f"{quantity:16} {value}")
    print("parameters:")
    reader = TensorReader(path, manifest)
    width = max(map(len, manifest.tensors), default=0)
    for name, entry in manifest.tensors.items():
        shape = " x ".join(map(str, entry.shape)) or "scalar"
        words = f"  {_statistics(reader, name)}" if has_tensors else ""
        print(f"  {name:{width}}  {shape:18}{words}".rstrip())


def _find_readable(directory: Path) -> tuple[Path, Manifest]:
    if is_checkpoint(directory):
        return directory, read_checkpoint(directory)
    check_run_dir(directory)
    if (found := newest_readable(directory)) is None:
        raise CheckpointError(f"{no_checkpoint_yet(directory)}, so there is nothing to show")
    return found


def _summary(path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (quantity, value) rows of a manifest."""
    state, data = manifest.state, manifest.data
    n_params = sum(math.prod(entry.shape) for entry in manifest.tensors.values())
    yield "step", f"{state.step:,}"
    yield "tokens seen", f"{state.tokens_seen:,}"
    yield "written", _written_at(path)
    yield "size", f"{format_size(manifest.n_bytes)} in {len(manifest.files)} files"
    yield "saved layout", f"{_layout(manifest)} (it loads at any layout)"
    yield "corpus", printable(data.corpus_hash)
    yield "tokenizer", printable(data.tokenizer_sha256)
    yield "config", str(path / CONFIG_FILE)
    yield "parameters", f"{n_params:,} in {len(manifest.tensors)} tensors"
    yield "per parameter", ", ".join(manifest.kinds)
    yield "optimizer", _scalars(state.optimizer)
    yield "loss scale", _scalars(state.loss_scaler)
    yield from _interventions(state)


def _interventions(state: TrainingState) -> Iterator[tuple[str, str]]:
    yield "guard", printable(", ".join(f"{name}={value}" for name, value in state.guard.items()))
    yield "updates skipped", f"{state.n_skipped}, {state.n_skipped_in_a_row} of them in a row until this step"
    yield "interventions", str(state.n_interventions)
    for window in state.skipped:
        yield "data skipped", f"data steps {window.first} to {window.last}: {printable(window.reason)}"


def _statistics(reader: "TensorReader", name: str) -> str:
    """Return mean, standard deviation, min and max of a parameter's master weights, read in chunks."""
    import torch

    n, total, square_sum = 0, 0.0, 0.0
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    for chunk in reader.chunks(name, MASTER):
        n += chunk.numel()
        total += float(chunk.sum(dtype=torch.float64))
        square_sum += float(chunk.double().square().sum())
        # minimum and maximum propagate NaN.
        low, high = torch.minimum(low, chunk.min()), torch.maximum(high, chunk.max())
    mean = total / n
    # Rounding can make the variance of equal elements negative.
    std = math.sqrt(max(0.0, square_sum / n - mean**2)) if math.isfinite(square_sum) else math.nan
    return f"mean {mean:+.3e}  std {std:.3e}  min {float(low):+.3e}  max {float(high):+.3e}"


def prune_old(run_dir: Path, *, keep_last: int, keep_every_steps: int | None, is_dry: bool) -> None:
    """Remove old checkpoints but never the newest intact one, which is verified first to find it.

    Safe while the run trains: a checkpoint is renamed before it is removed, so nobody finds half of one; a
    checkpoint that is being written has another name; and a restart resumes from the newest intact one.
    Raises CheckpointError if no checkpoint is intact; then nothing is removed.
    """
    check_run_dir(run_dir)
    check_at_least(1, {"--keep-last": keep_last, "--keep-every-steps": keep_every_steps})
    n_bytes = {path: _bytes_in(path) for path in list_checkpoints(run_dir)}
    old = list_old(run_dir, keep_last=keep_last, keep_every_steps=keep_every_steps)
    if not old:
        kept = f"all {len(n_bytes)} checkpoints of {run_dir} are kept"
        print(f"nothing to remove: {kept}" if n_bytes else no_checkpoint_yet(run_dir))
        return
    try:
        protected = newest_intact(run_dir, partial(print, flush=True))
    except CheckpointError as err:
        raise CheckpointError(f"nothing was removed: {err}") from err
    if protected in old:
        print(f"{protected}: kept, because it is the newest intact checkpoint")
    removed = [path for path in old if path != protected]
    if not is_dry:
        removed = prune(removed, Disk())
    for path in removed:
        print(f"{path}: {'would be ' if is_dry else ''}removed, {format_size(n_bytes.get(path, 0))}")
    freed = format_size(sum(n_bytes.get(path, 0) for path in removed))
    n_kept = len(n_bytes) - len(removed)
    print(f"{freed} {'would be ' if is_dry else ''}freed, {n_kept} of {len(n_bytes)} checkpoints kept")


def _layout(manifest: Manifest) -> str:
    saved = manifest.saved_layout
    return f"world={saved.world_size} tp={saved.tp} ep={saved.ep} zero={saved.zero_stage}"


def _scalars(values: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in values.items()) or "none"


def _bytes_in(directory: Path) -> int:
    """Return the size of a directory's files in bytes. They may vanish meanwhile."""
    n_bytes = 0
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in directory.iterdir():
            n_bytes += path.lstat().st_size
    return n_bytes


def _written_at(path: Path) -> str:
    """Return the local time when a checkpoint was finished or, if it is not, last changed."""
    for file in (path / MANIFEST, path):
        with suppress(FileNotFoundError, NotADirectoryError):
            return datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", timespec="seconds")
    return "-"
