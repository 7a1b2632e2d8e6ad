"""A small saved run with its texts, for tests of `turnout evaluate`, `lm-eval` and `experts`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import random_state, tiny_decoder
from tests.runs import run_config
from tests.saved_models import save_model
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.launch.cli.main import main
from turnout.launch.run_dir import create_run_dir
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder

MODEL = {"vocab_size": 300, "seq_len": 16, "n_layers": 3, "d_ff": 24, "n_dense_layers": 1}


@dataclass(frozen=True)
class SavedRun:
    """place: the working directory with the run "run" and the texts a.jsonl and b.jsonl."""

    place: Path
    corpus: Corpus
    decoder: Decoder
    state: RouterState

    @property
    def run_dir(self) -> Path:
        return self.place / "run"


def make_saved_run(place: Path, **model: Any) -> SavedRun:
    texts = {"a": make_texts(12), "b": make_texts(7, seed=1)}
    texts["b"].append("caf\u00e9 \u4f60\u597d \U0001f686\n")
    corpus = make_corpus(place, texts, valid_frac=0.5)
    cfg = run_config(
        model={**MODEL, **model}, train={"expert_backend": "reference"}, data={"corpus": str(corpus.path)}
    )
    decoder = tiny_decoder(cfg.model, dtype=torch.float32, gain=4.0)
    state = random_state(cfg.model, bias=0.05)
    create_run_dir(place / "run", cfg, corpus, nproc=1)
    save_model(place / "run", cfg, decoder, state, corpus.tokenizer_path)
    return SavedRun(place, corpus, decoder, state)


def turnout(*arguments: object) -> int:
    """Run a command in this process; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)
