"""A saved model in memory, with its tokenizer, for commands that only read it: one process, one device.

open_weights finds and verifies what a path names, without reading a tensor into memory; load_model builds the
whole model from it. Models that are spread over devices are loaded in training/generation/offload.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from turnout.data.corpus import Corpus
from turnout.data.errors import DataError
from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.launch.run_dir import read_config
from turnout.launch.verify import (
    check_run_dir,
    is_checkpoint,
    newest_intact,
    no_checkpoint_yet,
    verify_with_bar,
)
from turnout.moe.experts.experts import choose_backend
from turnout.moe.flops import n_params
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.checkpoint.directory import list_checkpoints
from turnout.training.checkpoint.weights import CheckpointWeights, Weights, load_decoder
from turnout.training.errors import CheckpointError
from turnout.training.export.hf_config import is_hf_directory
from turnout.training.export.reader import HfWeights

DType = Literal["float32", "bfloat16"]


def open_weights(path: Path) -> Weights:
    """Return the weights of a run (its newest intact checkpoint), a checkpoint, or a Hugging Face directory.

    Every byte of a checkpoint is verified first; the result goes to stderr. Raises ConfigError if the path is
    none of these or holds a model that Turnout cannot compute, CheckpointError if it is damaged.
    """
    if is_hf_directory(path):
        return HfWeights(path)
    return open_checkpoint(path)


def open_checkpoint(path: Path) -> CheckpointWeights:
    """Return the weights of a checkpoint, or of a run's newest intact one, after verifying every byte.

    Raises ConfigError if the path is neither, CheckpointError if there is no intact checkpoint.
    """
    if is_checkpoint(path):
        _report(verify_with_bar(path))
    else:
        check_run_dir(path)
        if not list_checkpoints(path):
            raise CheckpointError(f"{no_checkpoint_yet(path)}, so there are no weights to read")
        path = newest_intact(path, _report)
    return CheckpointWeights(path, read_config(path).model)


def load_tokenizer_of(weights: Weights) -> Tokenizer:
    """Return a model's tokenizer. Raises CheckpointError if it has more tokens than the model."""
    tokenizer, vocab_size = load_tokenizer(weights.tokenizer_path), weights.cfg.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{weights.tokenizer_path}: has {tokenizer.vocab_size} tokens where the model has {vocab_size}; "
            "put the tokenizer there that the model was trained with"
        )
    return tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """place: the directory that the weights were read from."""

    place: Path
    decoder: Decoder
    state: RouterState
    tokenizer: Tokenizer


def load_model(path: Path, *, dtype: DType, corpus: Corpus | None = None) -> LoadedModel:
    """Load a run's newest intact checkpoint, a checkpoint or an export, and describe it on stderr.

    The model goes to the GPU if there is one. corpus: the corpus that it will read, if any. Raises DataError
    if that corpus was prepared with another tokenizer.
    """
    weights = open_weights(path)
    cfg, tokenizer = weights.cfg, load_tokenizer_of(weights)
    if corpus is not None:
        check_same_tokens(corpus, tokenizer, weights.place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = choose_backend(cfg, torch.device(device), getattr(torch, dtype))
    decoder, state = load_decoder(weights, device=device, dtype=getattr(torch, dtype), expert_backend=backend)
    _report(
        f"{weights.place}: {n_params(cfg):,} parameters as {dtype} on {device}, experts by {backend}, "
        f"windows of {cfg.seq_len} tokens"
    )
    return LoadedModel(weights.place, decoder, state, tokenizer)


def check_same_tokens(corpus: Corpus, tokenizer: Tokenizer, place: Path) -> None:
    """Raise DataError if a corpus was prepared with another tokenizer than that of the model at a place."""
    if corpus.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{corpus.path}: was tokenised by {corpus.manifest.tokenizer_sha256[:16]}.., but {place} has the "
            f"tokenizer {tokenizer.sha256[:16]}..; evaluate its texts, or prepare them with "
            f"--tokenizer {tokenizer.path}"
        )


def _report(text: str) -> None:
    # stdout is left to what the command itself prints.
    print(text, file=sys.stderr, flush=True)
