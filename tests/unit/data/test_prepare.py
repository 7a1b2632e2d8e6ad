"""Preparing a corpus: what it holds, that it continues to the same bytes, and what it refuses."""

import hashlib
import itertools
import os
from pathlib import Path

import pytest

from tests.unit.data.prepare_fixtures import files_of, prepare
from tests.unit.data_fixtures import make_texts, write_hf_tokenizer, write_jsonl, write_tokenizer
from turnout.data.corpus import open_corpus
from turnout.data.encode import encode_documents
from turnout.data.errors import DataError
from turnout.data.plan import locked
from turnout.data.prepare import SAMPLE_BYTES, PrepareProgress, _Sample, is_valid
from turnout.data.sources import Source, iterate_documents
from turnout.data.tokenizer import load_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source("web", write_jsonl(tmp_path / "web.jsonl", make_texts(120)))


def test_the_manifest_counts_the_text_that_was_read(tmp_path: Path, source: Source) -> None:
    reports: list[PrepareProgress] = []
    manifest = prepare(tmp_path / "out", source, report=reports.append)
    texts = make_texts(120)
    train, valid = manifest.total("train"), manifest.total("valid")
    assert train.n_documents + valid.n_documents == 120
    assert train.n_text_bytes + valid.n_text_bytes == sum(len(text.encode()) for text in texts)
    assert 0 < valid.n_documents < 30
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    n_tokens = sum(len(tokenizer.encode(text)) + 2 for text in texts)
    assert train.n_tokens + valid.n_tokens == n_tokens
    assert (manifest.vocab_size, manifest.bos_id, manifest.eos_id) == (300, 1, 2)
    assert {r.stage for r in reports} == {"train tokenizer", "tokenize"}
    last = reports[-1]
    assert (last.done_documents, last.done_tokens) == (120, n_tokens)
    assert last.done_bytes == last.total_bytes == train.n_text_bytes + valid.n_text_bytes


def test_splits_follow_the_text_so_duplicates_stay_together(tmp_path: Path) -> None:
    texts = make_texts(60) * 3
    sources = [Source(n, write_jsonl(tmp_path / f"{n}.jsonl", texts[i:])) for i, n in enumerate("ab")]
    prepare(tmp_path / "out", *sources, valid_frac=0.3)
    corpus = open_corpus(tmp_path / "out", verify="checksum")
    tokenizer = corpus.load_tokenizer()
    found = {
        split: {
            tokenizer.decode(s.document(i).tolist())
            for s in corpus.split(split)
            for i in range(s.n_documents)
        }
        for split in ("train", "valid")
    }
    assert not found["train"] & found["valid"]
    assert len(found["train"]) + len(found["valid"]) == 60
    expected = {d.text for d in iterate_documents(sources[0]) if is_valid(d, 0.3)}
    assert len(expected) > 5 and len(found["valid"]) == len(expected)


def test_the_corpus_hash_depends_on_the_text_and_not_on_the_shards(tmp_path: Path, source: Source) -> None:
    first = prepare(tmp_path / "a", source)
    assert (
        prepare(tmp_path / "b", source, shard_tokens=10_000, vocab_size=310).corpus_hash == first.corpus_hash
    )
    assert prepare(tmp_path / "c", source, valid_frac=0.2).corpus_hash != first.corpus_hash
    other = Source("web", write_jsonl(tmp_path / "other.jsonl", [*make_texts(119), "changed"]))
    assert prepare(tmp_path / "d", other).corpus_hash != first.corpus_hash


def test_a_huge_document_is_encoded_in_pieces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = "seven cars on track\n" * 150_000
    path = tmp_path / "big.txt"
    path.write_text(text)
    documents = [*iterate_documents(Source("s", path)), *iterate_documents(Source("s", path))]
    found = list(encode_documents(documents, tokenizer=tokenizer, n_workers=1))
    assert [d for d, _ in found] == documents
    assert tokenizer.decode(found[1][1][1:-1].tolist()) == text
    assert found[1][1][[0, -1]].tolist() == [tokenizer.bos_id, tokenizer.eos_id]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_given_tokenizer_is_copied_and_used(tmp_path: Path, source: Source, kind: str) -> None:
    if kind == "sentencepiece":
        given = write_tokenizer(tmp_path)
    else:
        given = write_hf_tokenizer(tmp_path / "some.json", special_tokens=["<|endoftext|>"])
    manifest = prepare(tmp_path / "out", source, tokenizer=given, vocab_size=None)
    copy = tmp_path / "out" / f"tokenizer{given.suffix}"
    assert copy.read_bytes() == given.read_bytes()
    stream = open_corpus(tmp_path / "out", verify="checksum").split("train")[0]
    text = load_tokenizer(copy).decode(stream.document(0)[1:-1].tolist())
    assert text in make_texts(120)
    assert manifest.tokenizer_file == copy.name
    with pytest.raises(DataError, match=r"the vocabulary has \d+ tokens, but vocab_size=7"):
        prepare(tmp_path / "other", source, tokenizer=given, vocab_size=7)


@pytest.mark.parametrize(("valid_frac", "is_learned"), [(0.5, False), (0.0, True)], ids=["held out", "kept"])
def test_the_tokenizer_learns_nothing_of_held_out_text(
    tmp_path: Path, valid_frac: float, is_learned: bool
) -> None:
    """Only one document contains the word, and at valid_frac 0.5 it is held out."""
    path = write_jsonl(tmp_path / "rare.jsonl", [f"{i} " + "quokka " * 500 for i in range(20)])
    rare = next(d.text for d in iterate_documents(Source("rare", path)) if is_valid(d, 0.5))
    source = Source("web", write_jsonl(tmp_path / "web.jsonl", [*make_texts(60), rare]))
    prepare(tmp_path / "out", source, valid_frac=valid_frac)
    n_pieces = len(load_tokenizer(tmp_path / "out" / "tokenizer.model").encode("quokka"))
    assert (n_pieces <= 2) is is_learned, f"{n_pieces} pieces"


@pytest.mark.parametrize("order", [1, -1], ids=["as given", "backwards"])
def test_the_sample_for_the_tokenizer_is_uniform(order: int) -> None:
    """15 MB in pieces, each offered twice: the 10 MB with the smallest hashes are kept."""
    pieces = [f"{i} " + "x" * 30_000 for i in range(500)]
    sample = _Sample()
    for piece in [*pieces, *pieces][::order]:
        sample.offer(piece)
    by_hash = sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).digest())
    ends = list(itertools.accumulate(map(len, by_hash)))
    n_kept = 1 + next(i for i, end in enumerate(ends) if end >= SAMPLE_BYTES)
    assert 300 < n_kept < 400
    assert sample.pieces() == by_hash[:n_kept]


class Interrupted(Exception):
    """Raised by a test in the middle of a prepare."""


def interrupt_after_the_first_source(progress: PrepareProgress) -> None:
    if progress.stage == "tokenize":  # texts this short are reported only at the end of each source
        raise Interrupted


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Path, list[Source]]:
    """A corpus of two sources, with only the first committed."""
    texts = {"a": make_texts(60), "b": make_texts(30, seed=1)}
    sources = [Source(name, write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in texts.items()]
    with pytest.raises(Interrupted):
        prepare(tmp_path / "out", *sources, report=interrupt_after_the_first_source)
    assert len(list((tmp_path / "out" / "train").glob("a-*.json"))) > 1
    return tmp_path / "out", sources


def test_an_interrupted_prepare_continues_to_the_same_bytes(interrupted: tuple[Path, list[Source]]) -> None:
    out, sources = interrupted
    committed = {path: path.stat().st_mtime_ns for path in out.glob("*/a-*")}
    prepare(out, *sources)
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, "a shard was made again"
    prepare(out.with_name("whole"), *sources)
    assert files_of(out) == files_of(out.with_name("whole"))


def test_a_prepare_that_continues_refuses_other_text(interrupted: tuple[Path, list[Source]]) -> None:
    out, (source, other) = interrupted
    assert source.path is not None
    # Size and time stay as they were, so only the hash of the text differs.
    stat, text = source.path.stat(), source.path.read_text()
    source.path.write_text(text.replace("lever", "fever", 1))
    os.utime(source.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        DataError, match=r"documents 0..\d+ are no longer the text that a-00000 was made from"
    ):
        prepare(out, source, other)


def test_a_finished_corpus_is_left_alone(tmp_path: Path, source: Source) -> None:
    manifest = prepare(tmp_path / "out", source)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}
    reports: list[PrepareProgress] = []
    assert prepare(tmp_path / "out", source, report=reports.append) == manifest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")} == before
    assert reports == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_frac": 0.2}, r"valid_frac: 0.1 -> 0.2"),
        ({"vocab_size": 310}, r"tokenizer: trained, vocab_size 300 -> trained, vocab_size 310"),
        ({"shard_tokens": 401}, r"shard_tokens: 400 -> 401"),
    ],
)
def test_another_plan_is_refused(tmp_path: Path, source: Source, changes: dict, message: str) -> None:
    prepare(tmp_path / "out", source)
    with pytest.raises(DataError, match=f"other inputs or settings .*{message}.*give a new directory"):
        prepare(tmp_path / "out", source, **changes)


def test_changed_inputs_are_refused(tmp_path: Path, source: Source) -> None:
    prepare(tmp_path / "out", source)
    write_jsonl(source.path, make_texts(121))
    with pytest.raises(DataError, match=r"source web: .*web.jsonl: \d+ bytes, .* -> \d+ bytes"):
        prepare(tmp_path / "out", source)


def test_after_a_refusal_the_corrected_command_works_in_the_same_directory(
    tmp_path: Path, source: Source
) -> None:
    with pytest.raises(DataError, match="use at most"):
        prepare(tmp_path / "out", source, tokenizer=None, vocab_size=100_000)
    prepare(tmp_path / "out", source, tokenizer=None, vocab_size=400)
    prepare(tmp_path / "fresh", source, tokenizer=None, vocab_size=400)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_foreign_directory_is_refused_untouched(tmp_path: Path, source: Source) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tmp").write_text("mine")
    with pytest.raises(DataError, match=r"holds 1 other files, such as 'thesis.tmp', and no plan.json"):
        prepare(tmp_path / "out", source)
    assert (tmp_path / "out" / "thesis.tmp").read_text() == "mine"


def test_two_at_once_are_refused(tmp_path: Path, source: Source) -> None:
    with locked(tmp_path / "out"), pytest.raises(DataError, match="another prepare is writing here"):
        prepare(tmp_path / "out", source)
    prepare(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("names", "weights", "changes", "message"),
    [
        ("", [], {}, "sources: none given"),
        ("aa", [1, 1], {}, "source 'a': given 2 times"),
        ("ab", [1, None], {}, r"sources \['b'\] have no weight"),
        ("ab", [1, 0], {}, "source 'b': weight=0 must be positive"),
        ("a", [float("nan")], {}, "source 'a': weight=nan must be positive"),
        ("/", [None], {}, "source '/': the name becomes a file name"),
        ("a", [None], {"valid_frac": 1.0}, "valid_frac=1.0 must be"),
        ("a", [None], {"shard_tokens": 0}, "shard_tokens=0 must be"),
        ("a", [None], {"n_workers": 0}, "n_workers=0 must be"),
        ("a", [None], {"vocab_size": None}, "vocab_size: needed to train"),
        ("a", [None], {"vocab_size": 100_000}, "vocab_size=100000 is more than this text can fill"),
        ("a", [None], {"valid_frac": 0.999999}, "smaller valid_frac|no text to train on"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, names: str, weights: list, changes: dict, message: str
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_texts(20))
    sources = [Source(name, path, weight) for name, weight in zip(names, weights, strict=True)]
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "out", *sources, **changes)
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_a_source_without_text_or_without_train_documents(tmp_path: Path, source: Source) -> None:
    blank = Source("blank", write_jsonl(tmp_path / "blank.jsonl", ["", ""]))
    with pytest.raises(DataError, match="source 'blank': .*has no text"):
        prepare(tmp_path / "out", source, blank)
    text = next(d.text for d in iterate_documents(source) if is_valid(d, 0.1))
    held_out = Source("held", write_jsonl(tmp_path / "held.jsonl", [text]))
    with pytest.raises(DataError, match="source 'held': none of its 1 documents fell into the train split"):
        prepare(tmp_path / "out2", source, held_out)


def test_one_document_may_leave_the_valid_split_empty(tmp_path: Path) -> None:
    only = Source("one", write_jsonl(tmp_path / "one.jsonl", [" ".join(make_texts(50))]))
    manifest = prepare(tmp_path / "out", only, valid_frac=0.01)
    assert manifest.total("valid").n_documents == 0
    assert open_corpus(tmp_path / "out", verify="checksum").split("valid")[0].n_tokens == 0
