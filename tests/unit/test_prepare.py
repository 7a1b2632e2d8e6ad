import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.corpus import open_corpus
from data.encode import encode_documents
from data.errors import DataError
from data.plan import locked
from data.prepare import PrepareProgress, is_valid, prepare_corpus
from data.sources import Source, iterate_documents
from data.tokenizer import load_tokenizer
from tests.unit.data_fixtures import make_texts, write_hf_tokenizer, write_jsonl, write_tokenizer

# Runs `prepare_corpus` in a process of its own, which a test can kill.
PROGRAM = """
import json, sys
from pathlib import Path
from data.prepare import prepare_corpus
from data.sources import Source
if __name__ == "__main__":
    call = json.loads(sys.argv[1])
    prepare_corpus(
        sources=[Source(name, Path(path)) for name, path in call["sources"]],
        out=Path(call["out"]), tokenizer=Path(call["tokenizer"]) if call["tokenizer"] else None,
        vocab_size=None if call["tokenizer"] else 400, valid_frac=0.05, shard_tokens=call["shard_tokens"],
        n_workers=call["n_workers"],
    )
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def prepare(out: Path, *sources: Source, **changes: Any) -> Any:
    call: dict[str, Any] = {
        "sources": sources, "out": out, "tokenizer": None, "vocab_size": 300, "valid_frac": 0.1,
        "shard_tokens": 400, "n_workers": 1,
    }  # fmt: skip
    return prepare_corpus(**{**call, **changes})


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source("web", write_jsonl(tmp_path / "web.jsonl", make_texts(120)))


def test_manifest_counts_what_was_read(tmp_path: Path, source: Source) -> None:
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


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path, source: Source) -> None:
    prepare(tmp_path / "one", source)
    prepare(tmp_path / "two", source, n_workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_corpus_hash_is_of_the_text_and_not_of_the_shards(tmp_path: Path, source: Source) -> None:
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
    with pytest.raises(DataError, match="vocab_size=7 was asked"):
        prepare(tmp_path / "other", source, tokenizer=given, vocab_size=7)


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
        ("a", [None], {"valid_frac": 0.999999}, "smaller one|no text to train on"),
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


# ---- killed and continued: a real process, a real SIGKILL

CALL_SHARD_TOKENS = 20_000


@pytest.fixture(scope="module")
def long_call(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a call that takes a while, and the files of its uninterrupted run."""
    directory = tmp_path_factory.mktemp("killed")
    sources = [
        ("a", str(write_jsonl(directory / "a.jsonl", make_texts(6000, n_words=50)))),
        ("b", str(write_jsonl(directory / "b.jsonl", make_texts(3000, seed=1)))),
    ]
    call = {"sources": sources, "tokenizer": None, "shard_tokens": CALL_SHARD_TOKENS, "n_workers": 1}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps({**call, "out": str(directory / "whole")})],
        check=True,
        timeout=60,
    )
    return call, files_of(directory / "whole")


def start(call: dict[str, Any], out: Path, **popen: Any) -> subprocess.Popen:
    # A program in a file, because spawned workers import the main module again.
    program = out.with_suffix(".py")
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    argument = json.dumps({**call, "out": str(out)})
    return subprocess.Popen([sys.executable, str(program), argument], env=environment, **popen)


def kill_when(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.wait()


KILL_MOMENTS: dict[str, Callable[[Path], bool]] = {
    "plan": lambda out: (out / "plan.json").exists(),
    "tokenizer": lambda out: (out / "tokenizer.model").exists(),
    "first-shard-begun": lambda out: (out / "train" / "a-00000.bin.tmp").exists(),
    "valid-committed": lambda out: (out / "valid" / "a-00001.json").exists(),
    "train-committed": lambda out: (out / "train" / "a-00002.json").exists(),
    "second-source": lambda out: (out / "train" / "b-00000.json").exists(),
}


@pytest.mark.parametrize("moment", KILL_MOMENTS)
def test_a_killed_prepare_continues_to_the_same_bytes(
    tmp_path: Path, long_call: tuple[dict[str, Any], dict[str, bytes]], moment: str
) -> None:
    call, whole = long_call
    out = tmp_path / "out"
    kill_when(start(call, out), lambda: KILL_MOMENTS[moment](out))
    assert not (out / "corpus.json").exists()
    with pytest.raises(DataError, match="prepare was interrupted|not a corpus"):
        open_corpus(out, verify="size")
    committed = {p: p.stat().st_ino for p in out.glob("train/*.json")}
    prepare_again(call, out)
    assert {p: p.stat().st_ino for p in committed} == committed, "a committed shard was made again"
    assert files_of(out) == whole


def prepare_again(call: dict[str, Any], out: Path) -> None:
    prepare_corpus(
        sources=[Source(name, Path(path)) for name, path in call["sources"]],
        out=out,
        tokenizer=None,
        vocab_size=400,
        valid_frac=0.05,
        shard_tokens=CALL_SHARD_TOKENS,
        n_workers=1,
    )


def test_the_train_shard_is_committed_last(tmp_path: Path, source: Source) -> None:
    """Its JSON says that both are there, so a kill between the two must find the other one first."""
    prepare(tmp_path / "out", source, valid_frac=0.4)
    pairs = [(p, tmp_path / "out" / "train" / p.name) for p in (tmp_path / "out" / "valid").glob("*.json")]
    assert len(pairs) > 3
    assert all(valid.stat().st_mtime_ns < train.stat().st_mtime_ns for valid, train in pairs)


def test_documents_changed_behind_the_plan_are_refused(
    tmp_path: Path, long_call: tuple[dict[str, Any], dict[str, bytes]]
) -> None:
    call, _ = long_call
    out, path = tmp_path / "out", tmp_path / "mine.jsonl"
    path.write_bytes(Path(call["sources"][0][1]).read_bytes())
    call = {**call, "sources": [("a", str(path))]}
    kill_when(start(call, out), lambda: KILL_MOMENTS["train-committed"](out))
    # Same size and same time, other text: only the hash of the documents can tell.
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[content.index(b"lever")] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        DataError, match=r"documents 0..\d+ are no longer the text that a-00000 was made from"
    ):
        prepare_again(call, out)


def children_of(process: subprocess.Popen) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_die_with_the_parent(
    tmp_path: Path, long_call: tuple[dict[str, Any], dict[str, bytes]]
) -> None:
    call, whole = long_call
    out = tmp_path / "out"
    process = start({**call, "n_workers": 2}, out)
    children: set[int] = set()

    def is_due() -> bool:
        children.update(children_of(process))
        return (out / "train" / "a-00000.json").exists()

    kill_when(process, is_due)
    assert len(children) >= 2
    deadline = time.monotonic() + 10
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, f"workers outlive their parent: {children}"
        time.sleep(0.01)
    prepare_again(call, out)
    assert files_of(out) == whole


def test_a_full_disk_leaves_no_partial_file_and_a_rerun_works(
    tmp_path: Path, long_call: tuple[dict[str, Any], dict[str, bytes]]
) -> None:
    """A limit on the size of a file fails the write as a full disk does, in the process itself."""
    call, _ = long_call
    out = tmp_path / "out"
    whole_call = {**call, "shard_tokens": 2**26}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(whole_call, out, stderr=subprocess.PIPE, text=True, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "OSError: [Errno 27]" in errors, errors
    assert not list(out.rglob("*.tmp")) and not (out / "corpus.json").exists()
    process = start(whole_call, out)
    assert process.wait(timeout=60) == 0
    assert open_corpus(out, verify="checksum").split("train")[0].n_tokens * 2 > 400_000


def test_a_dead_worker_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    rng = random.Random(0)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    path = write_jsonl(tmp_path / "a.jsonl", ["".join(rng.choices("abc \n", k=400_000)) for _ in range(20)])
    encoded = encode_documents(iterate_documents(Source("a", path)), tokenizer=tokenizer, n_workers=2)
    next(encoded)
    workers = [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    for pid in workers:
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match="a tokenising worker of 2 died"):
        list(encoded)
