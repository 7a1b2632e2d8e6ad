"""metrics.jsonl across attempts of a run: one row per step, whatever earlier attempts wrote."""

import json
import math
from pathlib import Path

from tests.runs import read_rows
from turnout.training.metrics import MetricsLog


def write_rows(run_dir: Path, steps: range, *, after_step: int, loss: float) -> None:
    log = MetricsLog(run_dir, (), {}, after_step=after_step)
    for step in steps:
        log.write({"step": step, "train/loss": loss})
    log.close()


def test_an_attempt_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 9), after_step=0, loss=1.0)
    write_rows(tmp_path, range(6, 8), after_step=5, loss=2.0)
    want = [(step, 1.0 if step <= 5 else 2.0) for step in range(1, 8)]
    assert [(row["step"], row["train/loss"]) for row in read_rows(tmp_path)] == want


def test_a_row_truncated_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 4), after_step=0, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"}\n"))
    write_rows(tmp_path, range(3, 5), after_step=3, loss=2.0)
    assert [(row["step"], row["train/loss"]) for row in read_rows(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]


def test_a_value_that_json_cannot_express_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, (), {})
    log.write({"step": 1, "train/grad_norm": math.inf, "train/loss": math.nan, "train/lr": 0.5})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "train/grad_norm": None, "train/loss": None, "train/lr": 0.5}
