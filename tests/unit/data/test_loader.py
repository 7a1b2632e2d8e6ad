"""Batches against a slow twin, whatever the ranks and steps, and the prefetcher."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.data.errors import DataError
from turnout.data.loader import IGNORE_INDEX, SOURCE_BIT, Batch, Loader, Prefetcher

SEQ_LEN, BATCH_SEQS = 37, 11


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    texts = {"a": make_texts(60, n_words=12), "b": make_texts(25, seed=1)}
    return make_corpus(
        tmp_path_factory.mktemp("loader"), texts, weights={"a": 0.7, "b": 0.3}, shard_tokens=400
    )


def plain_row(corpus: Corpus, sample_id: int) -> tuple[list[int], list[int], list[int]]:
    """The slow twin: one token at a time, with documents recognised by the bos that begins each."""
    stream = corpus.split("train")[sample_id >> SOURCE_BIT]
    whole = np.concatenate([stream.document(i) for i in range(stream.n_documents)])
    begin = (sample_id & ((1 << SOURCE_BIT) - 1)) * SEQ_LEN
    bos_id = corpus.manifest.bos_id
    tokens, targets, doc_ids, doc_id = [], [], [], 0
    for i in range(begin, begin + SEQ_LEN):
        doc_id += bool(i > begin and whole[i] == bos_id)
        tokens.append(int(whole[i]))
        doc_ids.append(doc_id)
        targets.append(IGNORE_INDEX if whole[i + 1] == bos_id else int(whole[i + 1]))
    return tokens, targets, doc_ids


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("tokens", "targets", "doc_ids", "sample_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_batches_equal_the_plain_twin(corpus: Corpus) -> None:
    loader = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5)
    n_ignored = n_ignored_at_the_end = 0
    for step in (*range(20), 40):
        batch = loader.batch(step)
        assert batch.tokens.shape == batch.targets.shape == batch.doc_ids.shape == (BATCH_SEQS, SEQ_LEN)
        assert {t.dtype for t in (batch.tokens, batch.targets, batch.doc_ids, batch.sample_ids)} == {
            torch.int64
        }
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            found = (batch.tokens[row].tolist(), batch.targets[row].tolist(), batch.doc_ids[row].tolist())
            assert found == plain_row(corpus, sample_id)
        is_ignored = batch.targets == IGNORE_INDEX
        n_ignored += int(is_ignored.sum())
        n_ignored_at_the_end += int(is_ignored[:, -1].sum())
    assert n_ignored > 10, "no document boundary was seen, so this proves nothing"
    assert n_ignored_at_the_end, "no window's last target begins a document"


def test_sources_are_sampled_by_their_weights(corpus: Corpus) -> None:
    """220 samples at 0.7 to 0.3, although source a does not hold 0.7 of the tokens."""
    sizes = [stream.n_tokens for stream in corpus.split("train")]
    assert abs(sizes[0] / sum(sizes) - 0.7) > 0.1
    loader = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5)
    ids = np.concatenate([loader.windows(step)[2] for step in range(20)])
    assert np.bincount(ids >> SOURCE_BIT).tolist() == [154, 66]


def test_every_target_counts_when_attention_crosses_documents(corpus: Corpus) -> None:
    apart = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5).batch(3)
    across = Loader(
        corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5, attend_across_documents=True
    ).batch(3)
    assert torch.equal(apart.tokens, across.tokens)
    assert not across.doc_ids.any()
    boundary = apart.targets == IGNORE_INDEX
    assert boundary.any()
    assert (across.targets[boundary] == corpus.manifest.bos_id).all()
    assert torch.equal(across.targets[~boundary], apart.targets[~boundary])


@pytest.mark.parametrize("dp_size", [2, 3, 11])
def test_ranks_together_see_the_batch(corpus: Corpus, dp_size: int) -> None:
    loader = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5)
    whole = loader.batch(9)
    edges = np.linspace(0, BATCH_SEQS, dp_size + 1).astype(int)
    parts = [loader.batch(9, slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    joined = Batch(
        *(torch.cat([getattr(p, n) for p in parts]) for n in ("tokens", "targets", "doc_ids", "sample_ids"))
    )
    assert_same(joined, whole)


def test_a_step_needs_no_earlier_step(corpus: Corpus) -> None:
    used = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5)
    for step in range(7):
        used.batch(step)
    assert_same(used.batch(7), Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=5).batch(7))
    other = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=BATCH_SEQS, seed=6).batch(7)
    assert not torch.equal(other.sample_ids, used.batch(7).sample_ids)


def test_every_token_but_the_first_is_a_target_once_per_epoch(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": make_texts(40)})
    loader = Loader(corpus, seq_len=SEQ_LEN, batch_seqs=1, seed=0, attend_across_documents=True)
    (stream,), (n_samples,) = corpus.split("train"), loader.n_samples_per_source
    assert n_samples == (stream.n_tokens - 1) // SEQ_LEN
    rows = [loader.batch(step) for step in range(n_samples)]
    rows.sort(key=lambda batch: int(batch.sample_ids[0]))
    targets = torch.cat([batch.targets[0] for batch in rows]).tolist()
    assert targets == stream.read(1, n_samples * SEQ_LEN).tolist()


def test_too_little_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": make_texts(20), "tiny": ["x"]}, weights={"a": 1, "tiny": 1})
    with pytest.raises(
        DataError, match=r"source 'tiny' has 3 train tokens, fewer than one window of seq_len=37"
    ):
        Loader(corpus, seq_len=37, batch_seqs=2, seed=0)
    with pytest.raises(DataError, match=r"windows of seq_len=2, fewer than the 100000 sequences"):
        Loader(corpus, seq_len=2, batch_seqs=100_000, seed=0)


def test_prefetcher_keeps_the_order_and_stays_within_its_depth() -> None:
    started: list[int] = []

    def load(step: int) -> int:
        started.append(step)
        time.sleep(0.003 * (step % 3))
        return step * step

    seen = []
    with Prefetcher(load, 4, 20, depth=2) as prefetcher:
        for step, value in prefetcher:
            # The consumer is slower, so a thread without a limit would run ahead. Two values are ready, one
            # waits to be put, and one may be loading.
            time.sleep(0.01)
            assert len(started) <= step - 4 + 1 + 2 + 1 + 1
            seen.append((step, value))
    assert seen == [(step, step * step) for step in range(4, 20)]
    assert started == list(range(4, 20))


def test_prefetcher_raises_where_the_step_would_have_come() -> None:
    def load(step: int) -> int:
        if step == 3:
            raise DataError("shard gone")
        return step

    seen = []
    prefetcher = Prefetcher(load, 0, 10)
    with pytest.raises(DataError, match="shard gone"):
        for step, _ in prefetcher:
            seen.append(step)
    assert seen == [0, 1, 2]


def test_prefetcher_close_joins_its_thread() -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(lambda step: step, 0, 10**9)
    assert next(iter(prefetcher)) == (0, 0)
    assert threading.active_count() == before + 1
    prefetcher.close()
    assert threading.active_count() == before
    prefetcher.close()
