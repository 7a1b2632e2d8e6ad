"""`turnout doctor` as a user runs it: with layouts that agree, and with one made to differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.launch.cli.main import main
from turnout.launch.commands.doctor import examine
from turnout.launch.settings import load_config

ROOT = Path(__file__).parents[3]


def doctor(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turnout", "doctor", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.long
def test_every_layout_of_a_rich_config_agrees(tmp_path: Path) -> None:
    make_corpus(tmp_path, {"text": make_texts(300)}, valid_frac=0.05, shard_tokens=5000)
    settings = ["data.corpus=corpus", "model.vocab_size=300", "model.seq_len=32", "train.microbatch_seqs=4"]
    settings += ["model.n_dense_layers=1", "model.d_ff=64", "model.balance.scope=batch"]
    settings += ["model.balance.bias_rate=0.001", "model.router.capacity_factor=1.25", "sample.n_tokens=8"]
    settings += ["model.router.score=sigmoid"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    run = doctor(tmp_path, "tiny", "--nproc", "2", *overrides)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("warning two-balancings: model.balance.coef=0.01: ")
    assert lines[-1] == "all 18 variants agree with one process"
    rows = [line for line in lines if line.count("agrees") and "\u2502" in line]
    assert len(rows) == 18
    for words in (
        "tp=1 ep=1 zero=1",
        "tp=2 ep=2 zero=2",
        "micro-batches=4",
        "recompute=full",
        "chunks=2",
        "max-load=",
    ):
        assert any(words in row for row in rows), words


def test_a_wrong_factor_is_found_and_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cfg = load_config("tiny", [])
    code = examine(cfg, nproc=2, layouts=["tp=1,ep=2"], worker="tests.distributed.runs.sabotaged_doctor")
    output = capfd.readouterr()
    assert code == 1
    errors = output.err.splitlines()
    assert errors[-1] == "turnout: 10 of 10 variants differ from one process"
    first = next(line for line in errors if line.startswith("turnout: dp=2 tp=1 ep=2 zero=1: "))
    assert "balancing gradient: " in first and " is 0.5 times that of one process" in first
    assert first.endswith("on ranks 0, 1)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--layouts", "tp=3"], "parallel.tp=3 must divide world_size=2; use one of [1, 2]"),
        (["tiny", "--layouts", "dp=2"], "--layouts 'dp=2' is not tp=N,ep=N; for example"),
        (
            ["tiny", "--layouts", "tp=2", "--set", "model.n_kv_heads=1"],
            "--layouts tp=2: parallel.tp=2 must divide model.n_kv_heads=1; leave it out",
        ),
        (["tiny", "--nproc", "0"], "--nproc 0 must be at least 1"),
        (
            ["tiny", "--set", "model.top_k=1"],
            "top_k=1 with router.normalize=true makes every routing weight 1",
        ),
    ],
    ids=["indivisible", "unknown axis", "does not fit", "no ranks", "k=1 renormalised"],
)
def test_a_wrong_request_is_answered_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("turnout: ") and message in errors[0], errors
