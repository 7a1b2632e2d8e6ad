"""Each rank's part of a step: all parts together are the global batch, sample by sample."""

import pytest
import torch

from tests.runs import run_config
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.data.loader import Batch, Loader
from turnout.training.batches import build_loader, prefetch
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout

FIELDS = ("tokens", "targets", "doc_ids", "sample_ids")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("batches"), {"text": make_texts(300, n_words=5)})


def config(*, microbatch_seqs: int = 2, seed: int = 0, attend_across_documents: bool = False) -> RunConfig:
    """Return a config of batches of 8 sequences of 12 tokens; train.seed is 3."""
    data = {"corpus": "unused", "seed": seed, "attend_across_documents": attend_across_documents}
    return run_config(train={"n_steps": 7, "microbatch_seqs": microbatch_seqs}, data=data)


def assert_same(a: Batch, b: Batch) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def joined(microbatches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in microbatches]) for name in FIELDS))


@pytest.mark.parametrize(("dp", "microbatch_seqs"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_together_see_the_same_samples_in_order(corpus: Corpus, dp: int, microbatch_seqs: int) -> None:
    cfg = config(microbatch_seqs=microbatch_seqs)
    loader = build_loader(cfg, corpus)
    by_rank = [list(prefetch(loader, cfg, Layout(dp), rank)) for rank in range(dp)]
    for step in range(cfg.train.n_steps):
        microbatches = [mb for steps in by_rank for mb in steps[step][1]]
        assert all(steps[step][0] == step for steps in by_rank)
        assert {mb.tokens.size(0) for mb in microbatches} == {microbatch_seqs}
        whole = loader.batch(step)
        assert whole.doc_ids.any(), "no sequence has two documents"
        assert_same(joined(microbatches), whole)


def test_tensor_parallel_ranks_read_the_same_rows(corpus: Corpus) -> None:
    cfg = config()
    loader, by_rank = build_loader(cfg, corpus), []
    for rank in range(4):
        with prefetch(loader, cfg, Layout(4, tp=2), rank) as steps:
            by_rank.append(next(iter(steps))[1])
    assert_same(joined(by_rank[0]), joined(by_rank[1]))
    assert_same(joined(by_rank[2]), joined(by_rank[3]))
    assert_same(joined([*by_rank[0], *by_rank[2]]), loader.batch(0))


def test_a_step_reads_the_data_step_that_data_step_at_returns(corpus: Corpus) -> None:
    cfg = config()
    loader = build_loader(cfg, corpus)
    after_a_gap = list(prefetch(loader, cfg, Layout(1), 0, start_step=4, data_step_at=lambda step: step + 10))
    assert [step for step, _ in after_a_gap] == [4, 5, 6]
    for step, microbatches in after_a_gap:
        assert_same(joined(microbatches), loader.batch(step + 10))


@pytest.mark.parametrize("attend_across_documents", [False, True])
def test_the_loader_uses_the_settings_of_the_data_section(
    corpus: Corpus, attend_across_documents: bool
) -> None:
    cfg = config(seed=11, attend_across_documents=attend_across_documents)
    want = Loader(corpus, seq_len=12, batch_seqs=8, seed=11, attend_across_documents=attend_across_documents)
    assert_same(build_loader(cfg, corpus).batch(4), want.batch(4))
