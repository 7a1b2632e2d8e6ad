"""Write any weights as the first checkpoint of a run, which training can resume at every layout.

It holds no optimizer state, as before the first update, and uniform router loads.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from turnout.moe.load_balancing import RouterState
from turnout.moe.parallel.sharding import is_expert, split_of
from turnout.training.checkpoint.directory import checkpoint_path
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import (
    BIAS,
    FORMAT_VERSION,
    LOAD_FRAC,
    MANIFEST,
    MANIFEST_SUM,
    ROUTER_FILE,
    Attached,
    FileEntry,
    Manifest,
    SavedLayout,
    TensorEntry,
    TrainingState,
    rank_file,
    to_bytes,
)
from turnout.training.checkpoint.resharding import Matrix
from turnout.training.checkpoint.safetensors_stream import Stored, cut_by_bytes
from turnout.training.checkpoint.tensor_files import key_of, write_bytes, write_stored, write_tensors
from turnout.training.checkpoint.weights import Weights, parameter_shapes
from turnout.training.config.optim import MASTER
from turnout.training.guard import GuardState

MAX_FILE_BYTES = 4 << 30


def write_first_checkpoint(
    weights: Weights, run_dir: Path, attached: Attached, *, max_file_bytes: int = MAX_FILE_BYTES
) -> Path:
    """Write step 0 of a run that nobody reads yet; return its path.

    One tensor is in memory at a time, one expert's where experts are stacked. Raises CheckpointError where
    the weights cannot be read, OSError where the disk fails.
    """
    disk, directory = Disk(), checkpoint_path(run_dir, 0)
    disk.make_directory(directory)
    shapes, files, tensors = parameter_shapes(weights.cfg), dict[str, FileEntry](), dict[str, TensorEntry]()
    # Each file looks like the file of one rank; a reader needs to know no more about ranks.
    parts = list(cut_by_bytes(shapes, lambda name: 4 * prod(shapes[name]), max_file_bytes))
    for number, names in enumerate(parts):
        stored = {
            key_of(MASTER, name): Stored(
                (prod(shapes[name]),), torch.float32, partial(_read_parts, weights, name)
            )
            for name in names
        }
        files[rank_file(number)] = write_stored(disk, directory / rank_file(number), stored)
        for name in names:
            matrix = Matrix.of(shapes[name], split_of(name))
            whole = (number, 0, matrix.row_width, 0, prod(shapes[name]))
            tensors[name] = TensorEntry(
                shape=shapes[name], n_rows=matrix.n_rows, row_width=matrix.row_width, shards=(whole,)
            )
    router = {BIAS: weights.read_bias(), LOAD_FRAC: RouterState.initial(weights.cfg).load_frac_ME}
    flat = {name: values.flatten() for name, values in router.items()}
    files[ROUTER_FILE] = write_tensors(disk, directory / ROUTER_FILE, flat)
    for name, content in attached.files.items():
        files[name] = write_bytes(disk, directory / name, content)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        saved_layout=SavedLayout(world_size=len(parts), tp=1, ep=1, zero_stage=1),
        data=attached.data,
        state=_first_state(),
        kinds=(MASTER,),
        tensors=dict(sorted(tensors.items())),
        files=files,
    )
    text, check_sum = to_bytes(manifest)
    write_bytes(disk, directory / MANIFEST, text)
    write_bytes(disk, directory / MANIFEST_SUM, check_sum)
    for place in (directory, directory.parent, run_dir):
        disk.flush_directory(place)
    return directory


def _read_parts(weights: Weights, name: str) -> Iterator[Tensor]:
    """Yield a parameter whole, or expert by expert where experts are stacked."""
    for expert in range(weights.cfg.n_experts) if is_expert(name) else (None,):
        yield weights.read(name, expert)


def _first_state() -> TrainingState:
    return TrainingState(
        step=0,
        tokens_seen=0,
        n_skipped=0,
        n_skipped_in_a_row=0,
        n_interventions=0,
        optimizer={},
        loss_scaler={},
        guard=asdict(GuardState.initial()),
        skipped=(),
    )
