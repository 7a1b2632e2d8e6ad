"""Evaluation equals scoring each token by hand, in any batches, and has no side effects."""

import math

import pytest
import torch

from tests.layouts import groups_of
from tests.models import random_state, tiny_config, tiny_decoder
from tests.ranks import join_alone
from tests.unit.by_hand import nll_by_hand
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.data.windows import evaluation_documents
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.evaluation.held_out import Evaluation, evaluate
from turnout.training.parallel.layout import Layout

CFG = tiny_config(vocab_size=300, seq_len=9)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"text": make_texts(40)}, valid_frac=0.3)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> None:
    join_alone()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(CFG, dtype=torch.float32, gain=8.0)


def state_of(cfg: ModelConfig) -> RouterState:
    """Return a router state whose bias changes which experts are chosen."""
    return random_state(cfg, bias=0.3)


def run(decoder: Decoder, corpus: Corpus, *, max_documents: int | None = None) -> Evaluation:
    groups = groups_of(Layout(1), 0)
    state = state_of(decoder.cfg)
    return evaluate(decoder, corpus, state, groups, microbatch_seqs=4, max_documents=max_documents)


def test_sums_equal_scoring_by_hand(decoder: Decoder, corpus: Corpus) -> None:
    documents = list(evaluation_documents(corpus))
    assert any(len(d.ids) > 2 * CFG.seq_len for d in documents), "some document needs several windows"
    bos_id = corpus.load_tokenizer().bos_id
    want = sum(nll_by_hand(decoder, state_of(CFG), d.ids.tolist(), bos_id) for d in documents)
    got = run(decoder, corpus)
    assert got.nll == pytest.approx(want, rel=1e-6)
    assert got.n_tokens == sum(len(d.ids) for d in documents)
    assert got.n_bytes == corpus.manifest.total("valid").n_text_bytes
    assert got.n_documents == len(documents)
    assert got.bits_per_byte == pytest.approx(want / math.log(2) / got.n_bytes, rel=1e-6)
    assert got.loss == pytest.approx(want / got.n_tokens, rel=1e-6)


def test_capacity_counts_all_tokens_not_only_those_scored(corpus: Corpus) -> None:
    """Context tokens of a document's last window are not scored, but fill experts like any others."""
    cfg = tiny_config(vocab_size=300, seq_len=9, router={"capacity_factor": 0.6})
    decoder = tiny_decoder(cfg, dtype=torch.float32, gain=8.0)
    documents, bos_id = list(evaluation_documents(corpus)), corpus.load_tokenizer().bos_id
    want = sum(nll_by_hand(decoder, state_of(cfg), d.ids.tolist(), bos_id) for d in documents)
    assert run(decoder, corpus).nll == pytest.approx(want, rel=1e-6)


def test_evaluation_has_no_side_effects(decoder: Decoder, corpus: Corpus) -> None:
    decoder.train()
    torch.manual_seed(5)
    random_before = torch.get_rng_state()
    weights_before = {n: p.clone() for n, p in decoder.named_parameters()}
    assert run(decoder, corpus) == run(decoder, corpus), "evaluation repeats itself"
    assert decoder.training
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(torch.equal(p, weights_before[n]) and p.grad is None for n, p in decoder.named_parameters())


def test_max_documents_limits_the_work(decoder: Decoder, corpus: Corpus) -> None:
    assert run(decoder, corpus, max_documents=2).n_documents == 2
