"""Commands on a full disk: they end with one line and leave no partial file."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_fixtures import make_corpus, make_texts, write_jsonl
from tests.unit.launch.test_bad_inputs import MODEL, train_with


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good recipe and a good corpus."""
    make_corpus(tmp_path, {"text": make_texts(60)}, valid_frac=0.2)
    (tmp_path / "run.toml").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def limit_file_size() -> None:
    """Let writes fail as on a full disk, above 100 kB per file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_ends_prepare_in_one_line_and_the_next_run_completes(work_dir: Path) -> None:
    write_jsonl(work_dir / "large.jsonl", make_texts(3000, seed=7))
    command = [sys.executable, "-m", "turnout", "prepare", "large.jsonl", "--out", "new"]
    command += ["--tokenizer", "given.model", "--workers", "1"]
    full = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit_file_size)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("turnout: ") and "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (work_dir / "new" / "corpus.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert (work_dir / "new" / "corpus.json").exists() and not list((work_dir / "new").rglob("*.tmp"))


def test_a_full_disk_ends_training_in_one_line(work_dir: Path) -> None:
    # 100 kB hold the first rows of metrics and TensorBoard events, but not 100,000 of them.
    command = [sys.executable, "-m", "turnout", *train_with("train.n_steps=100000", "log.every_steps=1")]
    full = subprocess.run(command, capture_output=True, text=True, timeout=200, preexec_fn=limit_file_size)
    assert full.returncode == 1
    first, last = full.stderr.splitlines()
    assert first.startswith("turnout: rank 0: ") and "File too large" in first
    assert last.startswith("turnout: the run ended early, exit code 1")
    assert (work_dir / "run" / "config.toml").exists()
