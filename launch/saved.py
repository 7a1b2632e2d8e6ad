"""What a path of a user holds: a run, one of its checkpoints, or an exported model."""

import sys
from pathlib import Path

from data.tokenizer import Tokenizer, load_tokenizer
from launch.checkpoints import check_run_dir, is_checkpoint, newest_intact, no_checkpoint_yet, verified
from launch.run_dir import read_config
from training.checkpoint_dir import list_checkpoints
from training.errors import CheckpointError
from training.export.hf_files import is_hf_directory
from training.export.reader import HfWeights
from training.weights import CheckpointWeights, Weights


def open_weights(path: Path) -> Weights:
    """Return the weights of a run (its newest intact checkpoint), a checkpoint, or a Hugging Face directory.

    Checkpoints are verified first, byte by byte, and that is told on stderr. Raises ConfigError where the
    path is none of these or its model is one that Turnout does not compute, CheckpointError where it is
    damaged.
    """
    if is_hf_directory(path):
        return HfWeights(path)
    return open_checkpoint(path)


def open_checkpoint(path: Path) -> CheckpointWeights:
    """Return the weights of a checkpoint, or of a run's newest intact one, after verifying every byte."""
    if is_checkpoint(path):
        _say(verified(path))
    else:
        check_run_dir(path)
        if not list_checkpoints(path):
            raise CheckpointError(f"{no_checkpoint_yet(path)}, so there are no weights to read")
        path = newest_intact(path, _say)
    return CheckpointWeights(path, read_config(path).model)


def load_tokenizer_of(weights: Weights) -> Tokenizer:
    """Return a model's tokenizer. Raises CheckpointError where it has tokens that the model has not."""
    tokenizer, n_known = load_tokenizer(weights.tokenizer_path), weights.cfg.vocab_size
    if tokenizer.vocab_size > n_known:
        raise CheckpointError(
            f"{weights.tokenizer_path}: has {tokenizer.vocab_size} tokens where the model has {n_known}; put "
            "the tokenizer there that the model was trained with"
        )
    return tokenizer


def _say(text: str) -> None:
    # Not to stdout, where commands that read a model print what it says.
    print(text, file=sys.stderr, flush=True)
