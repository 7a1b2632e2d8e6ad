"""Runs with a model in them that was never trained: loud weights of our choice, saved as a run saves them."""

from pathlib import Path

import torch

from data.corpus import Corpus
from launch.run_dir import create_run_dir, identity_of
from launch.settings import to_toml
from moe.balance import RouterState
from moe.model import Decoder
from moe.sharding import split_of
from tests.checkpoints import saver_of, state_at
from tests.ranks import join_alone
from training.checkpoint_manifest import CONFIG_FILE, MASTER, Attached
from training.checkpoint_tensors import key_of
from training.config import RunConfig
from training.owner import take_over
from training.parallel import Groups, Layout
from training.pieces import Matrix, Piece
from training.shares import BIAS, LOAD_FRAC, Place, Share


def save_model(
    run_dir: Path, cfg: RunConfig, corpus: Corpus, decoder: Decoder, state: RouterState, *, step: int = 10
) -> Path:
    """Make a run directory whose only checkpoint holds the decoder and the router's bias; return its path."""
    join_alone()
    create_run_dir(run_dir, cfg, corpus, nproc=1)
    groups = Groups(Layout(1), 0, torch.device("cpu"), timeout_s=30)
    files = {
        CONFIG_FILE: to_toml(cfg).encode(),
        corpus.tokenizer_path.name: corpus.tokenizer_path.read_bytes(),
    }
    attached = Attached(identity_of(corpus), files)
    saver = saver_of(run_dir, groups, cfg, token=take_over(run_dir), attached=attached)
    saver.save(_share(decoder, state), state_at(step))
    saver.close()
    groups.close()
    return run_dir


def _share(decoder: Decoder, state: RouterState) -> Share:
    places, tensors = {}, {}
    for name, parameter in decoder.named_parameters():
        matrix = Matrix.of(parameter.shape, split_of(name))
        piece = Piece(0, matrix.row_width, 0, parameter.numel())
        places[name] = Place(tuple(parameter.shape), matrix, piece)
        tensors[key_of(MASTER, name)] = parameter.detach().float().flatten()
    return Share((MASTER,), places, tensors, {BIAS: state.bias_ME, LOAD_FRAC: state.load_frac_ME})
