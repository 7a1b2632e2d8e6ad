"""What a path of a user holds: a run, or one of its checkpoints."""

import sys
from pathlib import Path

from launch.checkpoints import check_run_dir, is_checkpoint, no_checkpoint_yet, verified
from launch.run_dir import read_config
from training.checkpoint_dir import list_checkpoints, none_intact
from training.errors import CheckpointError
from training.weights import CheckpointWeights, Weights


def open_weights(path: Path) -> Weights:
    """Return the weights of a run (its newest intact checkpoint), or of a checkpoint.

    They are verified first, byte by byte, and that is told on stderr. Raises ConfigError where the path is
    neither, and CheckpointError where it is damaged.
    """
    if is_checkpoint(path):
        _say(verified(path))
    else:
        check_run_dir(path)
        path = _newest_intact(path)
    return CheckpointWeights(path, read_config(path).model)


def _newest_intact(run_dir: Path) -> Path:
    faults = []
    for path in list_checkpoints(run_dir):
        try:
            _say(verified(path))
            return path
        except CheckpointError as err:
            faults.append(str(err))
            _say(f"damaged: {err}")
    if not faults:
        raise CheckpointError(f"{no_checkpoint_yet(run_dir)}, so there are no weights to read")
    raise CheckpointError(none_intact(run_dir, faults))


def _say(text: str) -> None:
    # Not to stdout, where commands that read a model print what it says.
    print(text, file=sys.stderr, flush=True)
