"""Held-out loss over real ranks: the same sums for any number of ranks and any batch."""

from pathlib import Path

import pytest
import torch

from tests.layouts import groups_of
from tests.models import random_state, tiny_config, tiny_decoder
from tests.ranks import run_ranks
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import open_corpus
from turnout.training.evaluation.held_out import Evaluation, evaluate
from turnout.training.parallel.layout import Layout

CFG = tiny_config(vocab_size=300)


def evaluate_on_rank(rank: int, corpus_path: Path, world_size: int, microbatch_seqs: int) -> Evaluation:
    groups = groups_of(Layout(world_size), rank)
    decoder = tiny_decoder(CFG, dtype=torch.float32, gain=3.0)
    corpus = open_corpus(corpus_path, verify="size")
    return evaluate(
        decoder, corpus, random_state(CFG), groups, microbatch_seqs=microbatch_seqs, max_documents=None
    )


def test_any_number_of_ranks_gives_the_same_sums(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"text": make_texts(40)}, valid_frac=0.3)
    (alone,) = run_ranks(evaluate_on_rank, 1, corpus.path, 1, 5)
    assert alone.n_bytes == corpus.manifest.total("valid").n_text_bytes
    for world_size, microbatch_seqs in [(2, 4), (4, 3), (4, 50)]:  # the last has more room than windows
        for got in run_ranks(evaluate_on_rank, world_size, corpus.path, world_size, microbatch_seqs):
            assert got.nll == pytest.approx(alone.nll, rel=1e-6)
            assert (got.n_tokens, got.n_documents) == (alone.n_tokens, alone.n_documents)
