"""A command whose stdout is a closed pipe still writes its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.saved_fixtures import SavedRun, make_saved_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return make_saved_run(tmp_path_factory.mktemp("saved"))


def test_a_closed_pipe_loses_no_result(saved: SavedRun) -> None:
    command = [sys.executable, "-m", "turnout", "evaluate", "run", "a.jsonl", "--out", "piped.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.Popen(
        command, cwd=saved.place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    said = done.stderr.read()
    assert done.wait(60) == 1 and "pipe" not in said and "Traceback" not in said, said
    assert json.loads((saved.place / "piped.json").read_text())["total"]["n_tokens"] > 0
