"""`turnout train` as a user runs it: real processes, DeepSpeed's launcher, and a run directory that
other programs read.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import read_rows
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.launch.ranks.attempt_records import read_attempts

RECIPE = """
[model]
n_layers = 2
d_model = 32
n_heads = 2
n_kv_heads = 2
d_head = 16
d_expert = 16
n_experts = 4
top_k = 2
vocab_size = 300
seq_len = 32

[model.balance]
scope = "batch"
bias_rate = 0.001

[train]
n_steps = 12
batch_tokens = 256
microbatch_seqs = 2
clip_norm = 1.0

[optim]
lr = 1e-2

[optim.schedule]
warmup_steps = 2

[data]
corpus = "corpus"

[eval]
every_steps = 6

[sample]
prompts = ["the train"]
n_tokens = 8

[log]
every_steps = 3
"""
PROMISED_METRICS = {
    "step",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/balance_loss",
    "train/z_loss",
    "train/tokens_seen",
    "perf/tokens_per_s",
    "perf/step_ms",
    "perf/mfu_frac",
    "mem/peak_gib",
    "router/max_load_frac",
    "router/entropy_nats",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("place")
    make_corpus(directory, {"text": make_texts(300)}, valid_frac=0.05, shard_tokens=5000)
    (directory / "run.toml").write_text(RECIPE)
    return directory


def turnout(place: Path, *arguments: str, **extra_env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turnout", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **extra_env}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> subprocess.CompletedProcess[str]:
    return turnout(place, "train", "run.toml", "--run-dir", "two", "--nproc", "2")


def test_two_ranks_train_evaluate_and_sample(
    place: Path, two_ranks: subprocess.CompletedProcess[str]
) -> None:
    assert two_ranks.returncode == 0, two_ranks.stderr
    lines = two_ranks.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["3/12", "6/12", "9/12", "12/12"]
    assert all(re.search(r"loss \d.*tokens/s.*left \d+m\d\ds", line) for line in steps)
    assert sum("bits/byte" in line for line in lines) == 2
    assert "--- sample ---" in lines and lines[lines.index("--- sample ---") + 1].startswith("the train")
    assert not two_ranks.stderr.strip(), "stderr stays empty"


def test_run_directory_holds_config_provenance_logs_and_metrics(
    place: Path, two_ranks: subprocess.CompletedProcess[str]
) -> None:
    run_dir = place / "two"
    assert tomllib.loads((run_dir / "config.toml").read_text())["train"]["n_steps"] == 12
    (provenance,) = json.loads((run_dir / "provenance.json").read_text())["attempts"]
    manifest = json.loads((place / "corpus" / "corpus.json").read_text())
    assert provenance["corpus_hash"] == manifest["corpus_hash"]
    assert provenance["packages"]["deepspeed"] and provenance["nproc"] == 2
    for rank in range(2):
        text = (run_dir / "logs" / f"rank-{rank:05d}.log").read_text()
        assert f"rank {rank} of 2: dp=2 tp=1 ep=1, ZeRO-1, fp32, experts by sorted_loop" in text
    rows = read_rows(run_dir)
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [row["step"] for row in steps] == [3, 6, 9, 12]
    assert all(row.keys() >= PROMISED_METRICS for row in steps)
    assert steps[-1]["train/tokens_seen"] == 12 * 256
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert [row["step"] for row in rows if "eval/bits_per_byte" in row] == [6, 12]


def test_tensorboard_holds_the_same_values(place: Path, two_ranks: subprocess.CompletedProcess[str]) -> None:
    events = EventAccumulator(str(place / "two" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    wanted = {row["step"]: row["train/loss"] for row in read_rows(place / "two") if "train/loss" in row}
    assert logged == pytest.approx(wanted)
    assert {"config/text_summary", "sample/text_summary"} <= set(events.Tags()["tensors"])


def check_same_rows(got_dir: Path, want_dir: Path) -> None:
    for got, want in zip(read_rows(got_dir), read_rows(want_dir), strict=True):
        assert got.keys() == want.keys()
        for name in want.keys() - {k for k in want if k.startswith(("perf/", "mem/"))}:
            assert got[name] == pytest.approx(want[name], rel=1e-4), name


def test_one_rank_and_other_microbatches_log_the_same_run(
    place: Path, two_ranks: subprocess.CompletedProcess[str]
) -> None:
    other = turnout(place, "train", "run.toml", "--run-dir", "one", "--set", "train.microbatch_seqs=8")
    assert other.returncode == 0, other.stderr
    check_same_rows(place / "one", place / "two")


def test_a_model_split_in_every_way_logs_the_same_run_and_sample(
    place: Path, two_ranks: subprocess.CompletedProcess[str]
) -> None:
    settings = ["tp=2", "ep=4", "sequence_parallel=true", "zero_stage=2", "ep_max_load=0.5"]
    sets = [word for setting in settings for word in ("--set", f"parallel.{setting}")]
    sets += ["--set", "train.recompute=full"]
    split = turnout(place, "train", "run.toml", "--run-dir", "split", "--nproc", "4", *sets)
    assert split.returncode == 0 and not split.stderr.strip(), split.stderr
    check_same_rows(place / "split", place / "two")
    # The cap is below the mean, so each layer needs extra chunks.
    assert all(row["perf/extra_chunks"] > 0 for row in read_rows(place / "split"))
    assert all(row["perf/extra_chunks"] == 0 for row in read_rows(place / "two"))
    got, want = (run.stdout.partition("--- sample ---")[2] for run in (split, two_ranks))
    assert got.splitlines()[1] == want.splitlines()[1]


def test_a_dry_run_prints_the_plan_and_starts_nothing(place: Path) -> None:
    planned = turnout(place, "train", "run.toml", "--nproc", "2", "--dry-run")
    assert planned.returncode == 0 and not planned.stderr, planned.stderr
    rows = {line[:18].strip(): line[19:] for line in planned.stdout.splitlines()}
    assert {
        "parameters",
        "active parameters",
        "state per rank",
        "activations",
        "peak per rank",
        "tokens per step",
        "steps",
        "data",
    } <= rows.keys()
    assert rows["steps"] == "12" and "epochs" in rows["data"]


def reset_signals(*, ignored: signal.Signals | None = None) -> None:
    """Undo inherited settings: a shell ignores SIGINT in background jobs, and nohup ignores SIGHUP."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN if signum == ignored else signal.SIG_DFL)


def start_long_run(
    place: Path, run_dir: str, *, ignored: signal.Signals | None = None
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a run that would take hours, wait for its first row, and return it with all its descendants."""
    command = [sys.executable, "-m", "turnout", "train", "run.toml", "--run-dir", run_dir, "--nproc", "2"]
    command += ["--set", "train.n_steps=1000000"]
    run = subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(reset_signals, ignored=ignored),
    )
    deadline_s = time.monotonic() + 90
    while not (place / run_dir / "metrics.jsonl").exists() or not read_rows(place / run_dir):
        if time.monotonic() > deadline_s or run.poll() is not None:
            run.kill()
            raise AssertionError("the run did not reach its first row")
        time.sleep(0.2)
    return run, psutil.Process(run.pid).children(recursive=True)


@pytest.mark.long
def test_an_error_in_one_rank_ends_the_run_and_blames_no_other(place: Path) -> None:
    run, below = start_long_run(place, "error")
    (victim,) = [p for p in below if p.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGINT)  # Python raises KeyboardInterrupt wherever the rank is
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 1
    reason, end = stderr.splitlines()
    assert re.fullmatch(r"turnout: rank 1: (step \d+: )?KeyboardInterrupt", reason)
    assert end.startswith("turnout: the run ended early, exit code 1")
    assert "KeyboardInterrupt" in (place / "error" / "logs" / "rank-00001.log").read_text()


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGHUP, id="SIGHUP", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGKILL, id="SIGKILL"),
    ],
)
def test_no_rank_outlives_the_command(signum: signal.Signals, place: Path) -> None:
    run, below = start_long_run(place, f"signal-{signum.name}")
    assert len(below) >= 3, "the launcher and two ranks"
    run.send_signal(signum)
    run.communicate(timeout=60)
    assert run.returncode == (-signum if signum == signal.SIGKILL else 1)
    _, alive = psutil.wait_procs(below, timeout=45)
    assert not alive
    (attempt,) = read_attempts(place / f"signal-{signum.name}")
    reasons = None if attempt.ending is None else attempt.ending.reasons
    assert reasons == (None if signum == signal.SIGKILL else ("interrupted",))


def test_a_run_under_nohup_continues(place: Path) -> None:
    run, below = start_long_run(place, "nohup", ignored=signal.SIGHUP)
    run.send_signal(signal.SIGHUP)
    n_rows, deadline_s = len(read_rows(place / "nohup")), time.monotonic() + 60
    while len(read_rows(place / "nohup")) < n_rows + 3:
        assert run.poll() is None and time.monotonic() < deadline_s, "the run ended"
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == 1
    _, alive = psutil.wait_procs(below, timeout=45)
    assert not alive


def test_a_loss_that_is_not_finite_stops_before_the_update(place: Path) -> None:
    exploding = [
        "--set",
        "optim.lr=1e30",
        "--set",
        "train.clip_norm=none",
        "--set",
        "optim.schedule.warmup_steps=0",
    ]
    run = turnout(place, "train", "run.toml", "--run-dir", "nan", "--nproc", "2", *exploding)
    assert run.returncode == 1
    reason, end = run.stderr.splitlines()
    assert re.match(r"turnout: ranks 0, 1: step \d+: .*the update was not applied", reason)
    assert end.startswith("turnout: the run ended early")
