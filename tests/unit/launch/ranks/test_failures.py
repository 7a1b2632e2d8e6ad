"""How a failed run is explained: causes before echoes, one line for each, and the right exit code."""

import json
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from turnout.data.errors import DataError
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.failures import explain_failures, record_failure
from turnout.training.errors import DivergedError
from turnout.training.metrics import MetricsLog
from turnout.training.parallel.flight_recorder import FlightRecorder
from turnout.training.parallel.layout import Layout

ROOT = Path(__file__).parents[4]
TWO = Layout(2)


@pytest.fixture
def attempt_dir(tmp_path: Path) -> Path:
    return make_attempt_dir(tmp_path / "logs")


def test_the_rank_that_knows_the_cause_decides_code_and_message(attempt_dir: Path) -> None:
    record_failure(RuntimeError("Connection reset by peer"), 0, attempt_dir)
    record_failure(DataError("shard-3.bin: truncated"), 2, attempt_dir)
    assert explain_failures(attempt_dir, Layout(3)) == (3, ["rank 2: shard-3.bin: truncated"])
    assert "DataError: shard-3.bin" in (attempt_dir.parent / "rank-00002.log").read_text()


def test_half_a_failure_file_hides_no_other(attempt_dir: Path) -> None:
    record_failure(DataError("shard-3.bin: truncated"), 0, attempt_dir)
    (attempt_dir / "rank-00001.failure.json").write_text('{"rank": 1, "co')
    assert explain_failures(attempt_dir, TWO) == (3, ["rank 0: shard-3.bin: truncated"])


def test_one_cause_on_all_ranks_is_one_line_with_its_step(attempt_dir: Path) -> None:
    for rank in range(2):
        err = DivergedError("loss is nan;\n  stop")
        err.add_note("step 7")
        record_failure(err, rank, attempt_dir)
    assert explain_failures(attempt_dir, TWO) == (1, ["ranks 0, 1: step 7: loss is nan; stop"])


def test_a_silent_rank_is_named_and_not_its_echoes(attempt_dir: Path) -> None:
    record_failure(
        RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), 0, attempt_dir
    )
    for rank, phase in enumerate(["forward", "backward"]):
        FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", TWO, rank).enter_phase(7, phase)
    assert explain_failures(attempt_dir, TWO) == (
        1,
        [
            "rank 1 died without an error message (killed, or out of memory); last seen in step 7, backward",
            "rank 0 lost contact in step 7, forward",
        ],
    )


@pytest.mark.parametrize(
    "message",
    ["/gloo/b.cc:78] Timed out waiting 4000ms for recv operation", "Application timeout caused pair closure"],
)
def test_a_rank_that_had_to_be_killed_is_named_and_not_those_that_timed_out(
    message: str, attempt_dir: Path
) -> None:
    record_failure(RuntimeError(message), 0, attempt_dir)
    for rank in range(2):
        FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", TWO, rank).enter_phase(7, "forward")
    _, lines = explain_failures(attempt_dir, TWO, stuck={1})
    assert lines == [
        "rank 1 hung (stopped, or stuck in the system) and had to be killed; last seen in step 7, forward",
        "rank 0 lost contact in step 7, forward",
        "parallel.timeout_s had passed; raise it if nothing hung and a rank was only slow",
    ]


def test_a_ranks_own_error_blames_no_other_rank(attempt_dir: Path) -> None:
    record_failure(KeyError("w_gate"), 0, attempt_dir)
    record_failure(RuntimeError("/gloo/b.cc:553] Connection closed by peer"), 1, attempt_dir)
    (attempt_dir / "rank-00002.stack").write_text("Current thread 0x7f (most recent call first):\n")
    for rank in range(3):  # the fourth had not started
        FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", Layout(4), rank).enter_phase(7, "forward")
    assert explain_failures(attempt_dir, Layout(4)) == (1, ["rank 0: KeyError: 'w_gate'"])


def test_without_flight_records_the_echoes_are_reported(attempt_dir: Path) -> None:
    for rank in range(2):
        record_failure(ConnectionResetError("by peer"), rank, attempt_dir)
    assert explain_failures(attempt_dir, TWO) == (1, ["ranks 0, 1: ConnectionResetError: by peer"])


def test_a_port_in_use_is_reported_as_such(attempt_dir: Path) -> None:
    record_failure(DistNetworkError("port: 29999, name: EADDRINUSE"), 0, attempt_dir)
    code, (line, *_) = explain_failures(attempt_dir, TWO)
    assert code == 1 and line == "rank 0: DistNetworkError: port: 29999, name: EADDRINUSE"


def test_a_crash_is_reported_with_its_signal(attempt_dir: Path) -> None:
    (attempt_dir / "rank-00001.stack").write_text("Fatal Python error: Segmentation fault\n\nThread 1:\n")
    record_failure(RuntimeError("/gloo/b.cc:553] Connection closed by peer"), 0, attempt_dir)
    line = "rank 1: crashed: Segmentation fault; rank-00001.stack shows where"
    assert explain_failures(attempt_dir, TWO) == (1, [line])


def test_each_attempt_reports_its_own_end(tmp_path: Path) -> None:
    """Ranks of an earlier attempt may still run; their files must not be mistaken for this one's."""
    earlier, attempt_dir = make_attempt_dir(tmp_path / "logs"), make_attempt_dir(tmp_path / "logs")
    record_failure(KeyError("old"), 0, earlier)
    FlightRecorder(earlier / "rank-00000.flight", TWO, 0)
    record_failure(DataError("new"), 1, attempt_dir)
    assert explain_failures(attempt_dir, TWO) == (3, ["rank 1: new"])
    assert {path.name for path in earlier.iterdir()} == {"rank-00000.failure.json", "rank-00000.flight"}


def test_metrics_stay_json_if_a_value_is_not_finite(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, ["tensorboard"], {"a": 1})
    metrics.write({"step": 3, "train/grad_norm": float("inf"), "train/loss": 2.5})
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 3, "train/grad_norm": None, "train/loss": 2.5}
    with pytest.raises(ValueError, match="closed file"):
        metrics.write({"step": 4})
