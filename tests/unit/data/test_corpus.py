"""A prepared corpus: its token streams across shards, and damage that must be found when it is opened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.test_megatron import write_shard
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import TokenStream, open_corpus
from turnout.data.errors import DataError
from turnout.data.megatron import Verify, shard_file


def test_documents_are_the_texts_between_control_ids(tmp_path: Path) -> None:
    texts = {"a": make_texts(30), "b": make_texts(7, seed=1)}
    corpus = make_corpus(tmp_path, texts, shard_tokens=300)
    tokenizer = corpus.load_tokenizer()
    for stream in corpus.split("train"):
        assert stream.n_documents == len(texts[stream.name])
        found = [stream.document(i) for i in range(stream.n_documents)]
        for ids, text in zip(found, texts[stream.name], strict=True):
            assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        whole = np.concatenate(found)
        assert stream.n_tokens == len(whole)
    assert len(corpus.manifest.sources[0].splits["train"].shards) > 3
    weights = [stream.weight for stream in corpus.split("train")]
    total = sum(stream.n_tokens for stream in corpus.split("train"))
    assert weights == [stream.n_tokens / total for stream in corpus.split("train")]


def test_reads_and_document_starts_cross_shards(tmp_path: Path) -> None:
    (stream,) = make_corpus(tmp_path, {"a": make_texts(25)}, shard_tokens=200).split("train")
    documents = [stream.document(i) for i in range(stream.n_documents)]
    whole = np.concatenate(documents)
    starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
    rng = np.random.default_rng(0)
    edges = stream._token_edges.tolist()
    ranges = [(0, len(whole)), *((e - 1, 2) for e in edges[1:-1]), *((e, 1) for e in edges[:-1])]
    ranges += [(int(a), int(rng.integers(1, len(whole) - a + 1))) for a in rng.integers(0, len(whole), 100)]
    for start, length in ranges:
        assert stream.read(start, length).tolist() == whole[start : start + length].tolist()
        expected = starts[(starts >= start) & (starts < start + length)]
        assert stream.document_starts_within(start, length).tolist() == expected.tolist()


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (5, 10**9)])
def test_a_range_outside_the_stream_is_an_error(tmp_path: Path, start: int, length: int) -> None:
    (stream,) = make_corpus(tmp_path, {"a": make_texts(3)}).split("train")
    with pytest.raises(IndexError, match="source 'a': tokens"):
        stream.read(start, length)


def test_shards_are_mapped_only_when_they_are_read(tmp_path: Path) -> None:
    infos = []
    for number in range(4):
        stem = tmp_path / f"s-{number}"
        infos.append((stem, write_shard(stem, [np.arange(10)])))
    for number in (0, 1, 3):
        shard_file(tmp_path / f"s-{number}", ".bin").unlink()
    stream = TokenStream("s", 1.0, infos)
    assert stream.n_tokens == 40
    assert stream.read(22, 3).tolist() == [2, 3, 4]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    return make_corpus(directory, {"a": make_texts(20)}, valid_frac=0.3, shard_tokens=10**6).path


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rename_tokenizer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("file", "damage", "verify", "message"),
    [
        ("tokenizer.model", flip_last_byte, "size", "tokenizer.model: SHA-256"),
        ("tokenizer.model", Path.unlink, "size", "tokenizer.model: the corpus's tokenizer is missing"),
        (
            "train/a-00000.bin",
            drop_last_byte,
            "size",
            r"train/a-00000.bin: \d+ bytes where \d+ were expected",
        ),
        ("valid/a-00000.idx", Path.unlink, "size", "valid/a-00000.idx: the file is missing"),
        ("train/a-00000.bin", flip_last_byte, "checksum", "train/a-00000.bin: SHA-256"),
        ("valid/a-00000.bin", flip_last_byte, "checksum", "valid/a-00000.bin: SHA-256"),
        ("train/a-00000.json", rename_tokenizer, "size", "a-00000.json: tokenised by another tokenizer"),
        ("corpus.json", drop_last_byte, "size", "corpus.json: damaged"),
        (
            "corpus.json",
            Path.unlink,
            "size",
            "prepare was interrupted .*run the same `turnout prepare` again",
        ),
    ],
)
def test_a_changed_corpus_is_refused_with_the_file_name(
    prepared: Path,
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], None],
    verify: Verify,
    message: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    open_corpus(copy, verify="checksum")
    damage(copy / file)
    with pytest.raises(DataError, match=message):
        open_corpus(copy, verify=verify)


def test_shards_of_another_corpus_are_refused(prepared: Path, tmp_path: Path) -> None:
    """Same tokenizer, same shard names, consistent files: only the manifest's totals differ."""
    copy, other = tmp_path / "copy", make_corpus(tmp_path / "other", {"a": make_texts(20, seed=5)}).path
    shutil.copytree(prepared, copy)
    for path in (other / "train").glob("a-00000.*"):
        shutil.copy(path, copy / "train")
    with pytest.raises(DataError, match=r"train: the shards of source 'a' have \d+ tokens where .* mixed"):
        open_corpus(copy, verify="checksum")


def test_no_corpus_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such corpus directory"):
        open_corpus(tmp_path / "nowhere", verify="size")
    with pytest.raises(DataError, match="not a corpus, it has no corpus.json"):
        open_corpus(tmp_path, verify="size")
