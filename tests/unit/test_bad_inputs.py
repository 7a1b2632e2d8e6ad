"""Mistakes a user can make at the command line: one clear line, the right exit code, nothing half-written."""

import importlib.util
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from tests.unit.data_fixtures import make_corpus, make_texts, write_jsonl, write_tokenizer

MODEL = """
[model]
n_layers = 2
d_model = 16
n_heads = 2
n_kv_heads = 1
d_head = 8
d_expert = 8
n_experts = 4
top_k = 2
vocab_size = 300
seq_len = 16

[train]
n_steps = 4
batch_tokens = 64
microbatch_seqs = 2

[optim]
lr = 1e-3

[sample]
n_tokens = 4

[data]
corpus = "corpus"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good recipe and a good corpus."""
    make_corpus(tmp_path, {"text": make_texts(60)}, valid_frac=0.2)
    (tmp_path / "run.toml").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0), capsys.readouterr().err


def check_refusal(result: tuple[int, str], code: int, words: str) -> None:
    got, message = result
    assert got == code, message
    assert words in message
    assert len(message.splitlines()) == 1 and message.startswith("turnout: "), message


def train_with(*overrides: str) -> list[str]:
    return ["train", "run.toml", "--run-dir", "run", *(x for o in overrides for x in ("--set", o))]


def truncate_shard(place: Path) -> None:
    path = next((place / "corpus" / "train").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_byte(place: Path) -> None:
    path = next((place / "corpus" / "train").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[11] ^= 1
    path.write_bytes(content)


def swap_tokenizer(place: Path) -> None:
    # vocab_size differs, so the bytes do.
    other = place / "other"
    other.mkdir()
    (place / "corpus" / "tokenizer.model").write_bytes(write_tokenizer(other, vocab_size=301).read_bytes())


def delete_manifest(place: Path) -> None:
    (place / "corpus" / "corpus.json").unlink()


def use_run_directory(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text("{}\n")


def put_file_in_the_way(place: Path) -> None:
    (place / "run").write_text("")


def drop_validation(place: Path) -> None:
    manifest = json.loads((place / "corpus" / "corpus.json").read_text())
    for source in manifest["sources"]:
        source["splits"]["valid"] = {"shards": [], "n_documents": 0, "n_tokens": 0, "n_text_bytes": 0}
    (place / "corpus" / "corpus.json").write_text(json.dumps(manifest))


def nothing(place: Path) -> None:
    pass


# name: (what is broken first, arguments, exit code, words of the message)
TRAINING: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no such recipe": (nothing, ["train", "tinny", "--run-dir", "run"], 2, "did you mean tiny?"),
    "no such recipe file": (nothing, ["train", "gone.toml", "--run-dir", "run"], 2, "gone.toml: cannot be read"),
    "no run directory": (nothing, ["train", "run.toml"], 2, "--run-dir is required"),
    "no ranks": (nothing, [*train_with(), "--nproc", "0"], 2, "--nproc 0 must be at least 1"),
    "an unknown option": (nothing, [*train_with(), "--nprok", "2"], 2, "--nprok"),
    "an unknown command": (nothing, ["trane", "run.toml"], 2, "trane"),
    "a typo in a setting": (nothing, train_with("model.n_layer=3"), 2, "did you mean model.n_layers?"),
    "a wrong type": (nothing, train_with("train.n_steps=soon"), 2, "train.n_steps='soon'"),
    "a setting without value": (nothing, train_with("train.n_steps"), 2, "is not path=value"),
    "groups that limit nothing": (nothing, train_with("model.router.n_groups=2", "model.router.top_groups=2"), 2, "no effect"),
    "experts that groups do not divide": (nothing, train_with("model.router.n_groups=3"), 2, "use one of [1, 2, 4]"),
    "top_k above n_experts": (nothing, train_with("model.top_k=5"), 2, "top_k=5 is more than n_experts=4"),
    "top 1 renormalised": (nothing, train_with("model.top_k=1"), 2, "router.normalize=false"),
    "a batch that ranks do not divide": (nothing, [*train_with(), "--nproc", "3"], 2, "use one of [1, 2] ranks"),
    "a batch that is no whole sequence": (nothing, train_with("train.batch_tokens=70"), 2, "use 64 or 80"),
    "tensor parallelism beyond the key heads": (nothing, [*train_with("parallel.tp=2"), "--nproc", "2"], 2, "must divide model.n_kv_heads=1; use one of [1]"),
    "a vocabulary smaller than the tokenizer's": (nothing, train_with("model.vocab_size=100"), 2, "use model.vocab_size=320"),
    "a used run directory": (use_run_directory, train_with(), 2, "run is not empty"),
    "a file as run directory": (put_file_in_the_way, train_with(), 2, "run is a file"),
    "no such corpus": (nothing, train_with("data.corpus=gone"), 3, "gone: no such corpus directory"),
    "an interrupted corpus": (delete_manifest, train_with(), 3, "prepare was interrupted"),
    "a truncated shard": (truncate_shard, train_with(), 3, ".bin"),
    "a changed shard": (flip_a_byte, train_with(), 3, ".bin"),
    "another tokenizer": (swap_tokenizer, train_with(), 3, "tokenizer.model"),
    "sequences beyond the corpus": (nothing, train_with("model.seq_len=65536", "train.batch_tokens=65536", "train.microbatch_seqs=1"), 3, "fewer than one window"),
    "a corpus smaller than one batch": (nothing, train_with("train.batch_tokens=65536"), 3, "fewer than the 4096 sequences"),
    "no held-out text": (drop_validation, train_with(), 3, "validation split is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "arguments", "code", "words"), TRAINING.values(), ids=TRAINING.keys())
def test_training_refuses(
    damage: Callable[[Path], None],
    arguments: list[str],
    code: int,
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(place)
    before = sorted(place.rglob("*"))
    check_refusal(run(*arguments, capsys=capsys), code, words)
    assert sorted(place.rglob("*")) == before, "nothing was written"


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(content) and None


PREPARING: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no input": (nothing, [], 2, "name some input"),
    "a missing file": (nothing, ["gone.txt"], 3, "gone.txt"),
    "an empty file": (write("empty.txt", b""), ["empty.txt"], 3, "empty.txt"),
    "invalid UTF-8": (write("bad.txt", b"good\xff\xfe"), ["bad.txt"], 3, "bad.txt"),
    "an unknown kind of file": (write("x.pdf", b"%PDF"), ["x.pdf"], 3, "x.pdf"),
    "broken JSON": (write("bad.jsonl", b'{"text": "a"}\n{"te\n'), ["bad.jsonl"], 3, "bad.jsonl:2"),
    "a missing field": (write("f.jsonl", b'{"body": "a"}\n'), ["f.jsonl"], 3, "body"),
    "a null text": (write("n.jsonl", b'{"text": null}\n'), ["n.jsonl"], 3, "n.jsonl:1"),
    "a vocabulary too large for the text": (write("s.txt", b"a short text\n"), ["s.txt"], 3, "vocab_size=32768"),
    "a tokenizer that is none": (write("t.model", b"junk"), ["text.jsonl", "--tokenizer", "t.model"], 3, "t.model"),
    "a held-out share of all": (nothing, ["text.jsonl", "--valid-frac", "1"], 2, "--valid-frac 1.0"),
    "a weight without source": (nothing, ["text.jsonl", "--weight", "web=1"], 2, "'web'"),
    "a weight that is no number": (nothing, ["text.jsonl", "--weight", "text=big"], 2, "NAME=NUMBER"),
    "a negative weight": (nothing, ["text.jsonl", "--weight", "text=-1"], 2, "must be positive"),
    "a weight given twice": (nothing, ["text.jsonl", "--weight", "text=1", "--weight", "text=2"], 2, "given twice"),
    "a vocabulary of nothing": (nothing, ["text.jsonl", "--vocab-size", "0"], 2, "--vocab-size 0 must be positive"),
    "a field of the embedded corpus": (nothing, ["--embedded", "--text-field", "body"], 2, "--text-field"),
    "another corpus's directory": (nothing, ["text.jsonl", "--vocab-size", "300", "--out", "corpus"], 3, "corpus"),
    "a directory that is not ours": (write("run", b""), ["text.jsonl", "--out", "."], 3, "give an empty or new directory"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "arguments", "code", "words"), PREPARING.values(), ids=PREPARING.keys())
def test_preparing_refuses(
    damage: Callable[[Path], None],
    arguments: list[str],
    code: int,
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(place)
    out = [] if "--out" in arguments else ["--out", "new"]
    check_refusal(run("prepare", *arguments, *out, "--workers", "1", capsys=capsys), code, words)
    assert not (place / "new" / "corpus.json").exists()
    assert not list(place.rglob("*.tmp"))


def limit_file_size() -> None:
    """Let writes fail as on a full disk, after 100 kB of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_ends_prepare_in_one_line_and_the_next_run_completes(place: Path) -> None:
    write_jsonl(place / "large.jsonl", make_texts(3000, seed=7))
    command = [sys.executable, "-m", "launch.cli", "prepare", "large.jsonl", "--out", "new"]
    command += ["--tokenizer", "given.model", "--workers", "1"]
    full = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit_file_size)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("turnout: ") and "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (place / "new" / "corpus.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert (place / "new" / "corpus.json").exists() and not list((place / "new").rglob("*.tmp"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = run(*train_with('log.trackers=["wandb"]'), capsys=capsys)
    assert code == 2 and "pip install 'turnout[wandb]'" in message


def test_a_full_disk_ends_training_in_one_line(place: Path) -> None:
    # Room for the rows of metrics and TensorBoard's first events, not for 100,000 of them.
    command = [sys.executable, "-m", "launch.cli", *train_with("train.n_steps=100000", "log.every_steps=1")]
    full = subprocess.run(command, capture_output=True, text=True, timeout=200, preexec_fn=limit_file_size)
    assert full.returncode == 1
    first, last = full.stderr.splitlines()
    assert first.startswith("turnout: rank 0: ") and "File too large" in first
    assert last.startswith("turnout: the run ended early, exit code 1")
    assert (place / "run" / "config.toml").exists()


def test_a_wrong_command_imports_nothing_heavy() -> None:
    code = "import sys; from launch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'deepspeed', 'datasets'} & set(sys.modules), 'help must be quick'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert not caught.value.code
    assert f"Example: turnout {command} " in capsys.readouterr().out
