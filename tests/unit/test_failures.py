"""What a failed run says: causes before echoes, one line for each, and the right exit code."""

import json
from pathlib import Path

import pytest

from data.errors import DataError
from launch.failures import explain_failures, record_failure
from training.errors import NonFiniteError
from training.metrics import MetricsLog


def test_the_rank_that_knows_the_cause_decides_code_and_words(tmp_path: Path) -> None:
    record_failure(RuntimeError("Connection reset by peer"), 0, tmp_path)
    record_failure(DataError("shard-3.bin: truncated"), 2, tmp_path)
    assert explain_failures(tmp_path, 3) == (3, ["rank 2: shard-3.bin: truncated"])
    assert "DataError: shard-3.bin" in (tmp_path / "rank-00002.log").read_text()


def test_one_cause_on_all_ranks_is_one_line_with_its_step(tmp_path: Path) -> None:
    for rank in range(2):
        err = NonFiniteError("loss is nan;\n  stop")
        err.add_note("step 7")
        record_failure(err, rank, tmp_path)
    assert explain_failures(tmp_path, 2) == (1, ["ranks 0, 1: step 7: loss is nan; stop"])


def test_a_silent_rank_is_named_before_its_echoes(tmp_path: Path) -> None:
    record_failure(RuntimeError("Connection closed"), 0, tmp_path)
    code, lines = explain_failures(tmp_path, 2)
    assert code == 1
    assert lines == [
        "rank 1 ended without a word: killed, or out of memory",
        "rank 0: RuntimeError: Connection closed",
    ]


def test_metrics_stay_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, ["tensorboard"], {"a": 1})
    metrics.write({"step": 3, "train/grad_norm": float("inf"), "train/loss": 2.5})
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 3, "train/grad_norm": None, "train/loss": 2.5}
    with pytest.raises(ValueError, match="closed file"):
        metrics.write({"step": 4})
