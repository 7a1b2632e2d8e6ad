"""A saved model in memory, with its tokenizer, for commands that only read it. One process, one device."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data.corpus import Corpus
from data.errors import DataError
from data.tokenizer import Tokenizer
from launch.saved import load_tokenizer_of, open_weights
from moe.balance import RouterState
from moe.counts import n_params
from moe.experts import choose_backend
from moe.model import Decoder
from training.weights import load_decoder

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoadedModel:
    """place: the directory that the weights were read from."""

    place: Path
    decoder: Decoder
    state: RouterState
    tokenizer: Tokenizer


def load_model(path: Path, *, dtype: DType, corpus: Corpus | None = None) -> LoadedModel:
    """Load a run's newest intact checkpoint, a checkpoint or an export, and say on stderr what was loaded.

    The model goes to the GPU where there is one. corpus: what it is to read. Raises DataError where that has
    other tokens than the model.
    """
    weights = open_weights(path)
    cfg, tokenizer = weights.cfg, load_tokenizer_of(weights)
    if corpus is not None:
        check_same_tokens(corpus, tokenizer, weights.place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = choose_backend(cfg, torch.device(device), getattr(torch, dtype))
    decoder, state = load_decoder(weights, device=device, dtype=getattr(torch, dtype), expert_backend=backend)
    print(
        f"{weights.place}: {n_params(cfg):,} parameters as {dtype} on {device}, experts by {backend}, "
        f"windows of {cfg.seq_len} tokens",
        file=sys.stderr,
    )
    return LoadedModel(weights.place, decoder, state, tokenizer)


def check_same_tokens(corpus: Corpus, tokenizer: Tokenizer, place: Path) -> None:
    """Raise DataError where a corpus has other tokens than the model at a place."""
    if corpus.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{corpus.path}: was tokenised by {corpus.manifest.tokenizer_sha256[:16]}.., but {place} has the "
            f"tokenizer {tokenizer.sha256[:16]}..; evaluate its texts, or prepare them with "
            f"--tokenizer {tokenizer.path}"
        )
