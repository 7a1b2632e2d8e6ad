"""A run that an earlier release made is continued, evaluated and exported by this one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import read_rows

ROOT = Path(__file__).parents[3]
RELEASE = ROOT / "tests" / "old_run" / "a31d440"
LAST_STEP = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the earlier release wrote, its run continued to step 14 with its own config.toml."""
    place = tmp_path_factory.mktemp("earlier") / "a31d440"
    shutil.copytree(RELEASE, place)
    resume = ["--run-dir", "run", "--nproc", "2", "--resume", "--allow-change", "train.n_steps"]
    said = turnout(place, "train", "run/config.toml", *resume, "--set", f"train.n_steps={LAST_STEP + 2}")
    assert f"resuming from run/checkpoints/step-{LAST_STEP:08d}\n" in said
    return place


def turnout(place: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "turnout", *arguments]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_resumed_with_all_that_it_knew(place: Path) -> None:
    rows, earlier = read_rows(place / "run"), read_rows(RELEASE / "run")
    assert rows[: len(earlier)] == earlier
    assert [row["step"] for row in rows[len(earlier) :]] == [LAST_STEP + 1, LAST_STEP + 2]
    assert rows[-1]["train/tokens_seen"] == earlier[-1]["train/tokens_seen"] + 2 * 256
    assert sorted(path.name for path in (place / "run" / "logs").glob("*-0*") if path.is_dir()) == [
        "attempt-00002",
        "start-00001",
    ]
    assert "attempt" in turnout(place, "status", "run", "--verify")


def test_it_is_evaluated_and_exported(place: Path) -> None:
    earlier = f"run/checkpoints/step-{LAST_STEP:08d}"
    assert "total" in turnout(place, "evaluate", earlier, "--corpus", "corpus")
    turnout(place, "export", "--checkpoint", earlier, "--out", "again", "--format", "hf")
    names = {path.name for path in (RELEASE / "export").iterdir()} - {"README.md"}
    assert names == {path.name for path in (place / "again").iterdir()} - {"README.md"}
    for name in names:
        assert (place / "again" / name).read_bytes() == (RELEASE / "export" / name).read_bytes(), name
