"""Prepare when it is killed, the disk is full, workers die, or its input changes meanwhile."""

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

from tests.unit.data.prepare_fixtures import files_of, prepare
from tests.unit.data_fixtures import make_texts, write_jsonl, write_tokenizer
from turnout.data.corpus import open_corpus
from turnout.data.errors import DataError
from turnout.data.prepare import prepare_corpus
from turnout.data.sources import Source

# Runs `prepare_corpus` in a process of its own, which a test can kill.
PROGRAM = """
import json, sys
from pathlib import Path
from turnout.data.prepare import prepare_corpus
from turnout.data.sources import Source
if __name__ == "__main__":
    call = json.loads(sys.argv[1])
    prepare_corpus(
        sources=[Source(name, Path(path)) for name, path in call["sources"]],
        out=Path(call["out"]), tokenizer=Path(call["tokenizer"]) if call["tokenizer"] else None,
        vocab_size=None if call["tokenizer"] else 400, valid_frac=0.05, shard_tokens=call["shard_tokens"],
        n_workers=call["n_workers"],
    )
"""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source("web", write_jsonl(tmp_path / "web.jsonl", make_texts(120)))


CALL_SHARD_TOKENS = 20_000


@pytest.fixture(scope="module")
def long_call(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a call that takes a while, and the files that its uninterrupted run leaves."""
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


def start_prepare(call: dict[str, Any], out: Path, **popen: Any) -> subprocess.Popen:
    # A program in a file, because spawned workers import the main module.
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
    kill_when(start_prepare(call, out), lambda: KILL_MOMENTS[moment](out))
    assert not (out / "corpus.json").exists()
    with pytest.raises(DataError, match="prepare was interrupted|not a corpus"):
        open_corpus(out, verify="size")
    committed = {p: p.stat().st_ino for p in out.glob("train/*.json")}
    (out / "stale.tmp").write_bytes(b"left by a run that was writing another file")
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
    """Its JSON says that both are complete, so the valid shard must be committed first."""
    prepare(tmp_path / "out", source, valid_frac=0.4)
    pairs = [(p, tmp_path / "out" / "train" / p.name) for p in (tmp_path / "out" / "valid").glob("*.json")]
    assert len(pairs) > 3
    assert all(valid.stat().st_mtime_ns < train.stat().st_mtime_ns for valid, train in pairs)


def test_documents_that_change_after_the_plan_are_refused(
    tmp_path: Path, long_call: tuple[dict[str, Any], dict[str, bytes]]
) -> None:
    call, _ = long_call
    out, path = tmp_path / "out", tmp_path / "mine.jsonl"
    path.write_bytes(Path(call["sources"][0][1]).read_bytes())
    call = {**call, "sources": [("a", str(path))]}
    kill_when(start_prepare(call, out), lambda: KILL_MOMENTS["train-committed"](out))
    # Other text of the same size and time: only the hash of the documents differs.
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
    process = start_prepare({**call, "n_workers": 2}, out)
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
    """A limit on file size makes the process's writes fail, as a full disk does."""
    call, _ = long_call
    out = tmp_path / "out"
    whole_call = {**call, "shard_tokens": 2**26}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start_prepare(whole_call, out, stderr=subprocess.PIPE, text=True, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "OSError: [Errno 27]" in errors, errors
    assert not list(out.rglob("*.tmp")) and not (out / "corpus.json").exists()
    process = start_prepare(whole_call, out)
    assert process.wait(timeout=60) == 0
    assert open_corpus(out, verify="checksum").split("train")[0].n_tokens * 2 > 400_000


# Run in a process of its own, so that a hang fails one test and does not stop them all.
KILL_WORKERS = """
import multiprocessing, sys
from pathlib import Path
from turnout.data.encode import encode_documents
from turnout.data.sources import Source, iterate_documents
from turnout.data.tokenizer import load_tokenizer

tokenizer, source = load_tokenizer(Path(sys.argv[1])), Source("a", Path(sys.argv[2]))
encoded = encode_documents(iterate_documents(source), tokenizer=tokenizer, n_workers=2)
next(encoded)
workers = multiprocessing.active_children()
assert len(workers) == 2
for worker in workers:
    worker.kill()
try:
    list(encoded)
except OSError as err:
    print(err)
"""


def test_a_dead_worker_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    rng = random.Random(0)
    tokenizer = write_tokenizer(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", ["".join(rng.choices("abc \n", k=400_000)) for _ in range(20)])
    command = [sys.executable, "-c", KILL_WORKERS, str(tokenizer), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "one of 2 tokenising workers died" in run.stdout, run.stderr


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path, source: Source) -> None:
    prepare(tmp_path / "one", source)
    prepare(tmp_path / "two", source, n_workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
