"""What a path of a user holds: a run, one of its checkpoints, or an exported model."""

import sys
from pathlib import Path

from launch.checkpoints import check_run_dir, is_checkpoint, no_checkpoint_yet, verified
from launch.run_dir import read_config
from training.checkpoint_dir import list_checkpoints, none_intact
from training.errors import CheckpointError
from training.weights import CheckpointWeights, Weights


def open_weights(path: Path) -> Weights:
    """Return the weights of a run (its newest intact checkpoint) or of a checkpoint.

    They are verified first, byte by byte, and that is told on stderr. Raises ConfigError where the path is
    neither, and CheckpointError where it is damaged.
    """
    if is_checkpoint(path):
        _say(verified(path))
        return CheckpointWeights(path, read_config(path).model)
    check_run_dir(path)
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{no_checkpoint_yet(path)}, so there are no weights to read")
    faults = []
    for checkpoint in found:
        try:
            _say(verified(checkpoint))
            return CheckpointWeights(checkpoint, read_config(checkpoint).model)
        except CheckpointError as err:
            faults.append(str(err))
            _say(f"damaged: {err}")
    raise CheckpointError(none_intact(path, faults))


def _say(text: str) -> None:
    # Not to stdout, where commands that read a model print what it says.
    print(text, file=sys.stderr, flush=True)
