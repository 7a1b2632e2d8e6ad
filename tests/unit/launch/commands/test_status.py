"""`turnout status` of runs that train, have finished, or were written by an earlier release."""

import shutil
from pathlib import Path

import pytest

from turnout.launch.commands.status import describe_attempts, describe_progress, status_lines
from turnout.launch.ranks.attempt_records import AttemptRecord, Begin, Ending, Kind

OLD_RUN = Path(__file__).parents[3] / "old_run" / "a31d440" / "run"


def attempt(kind: Kind | None) -> AttemptRecord:
    begin = Begin(began_s=0.0, nodes=("here",), n_ranks=2, from_step=0, pid=1)
    end = None if kind is None else Ending(kind, code=0, ended_s=1.0, saved_step=0)
    return AttemptRecord(Path("attempt-00001"), begin, end)


@pytest.mark.parametrize(
    ("step", "kinds", "wanted"),
    [
        (596, [None], "596 of 600, 2m00s of training left"),
        (596, ["done", "failed"], "596 of 600, 2m00s of training left"),
        (600, [None], "600 of 600"),
        (600, ["done", "failed"], "600 of 600"),
        (600, ["failed", "done"], "600 of 600, finished"),
        (600, [], "600 of 600"),
    ],
    ids=["training", "failed", "saving", "failed in its last save", "finished", "no attempt"],
)
def test_time_left_is_estimated_only_while_steps_are_left(
    step: int, kinds: list[Kind | None], wanted: str
) -> None:
    row = {"step": step, "perf/step_ms": 30_000.0}
    assert describe_progress(row, 600, [attempt(kind) for kind in kinds]) == wanted


def test_a_finished_run_of_an_earlier_release_is_shown(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(OLD_RUN, tmp_path / "run"))
    rows = dict(status_lines(run_dir, is_verified=False))
    assert rows.keys() == {"run", "attempt", "step", "loss", "speed", "checkpoint"}
    assert rows["step"] == "12 of 12, finished"
    assert rows["attempt"].startswith("1, 2 ranks on ") and rows["attempt"].endswith(
        "ended (done): exit code 0"
    )
    assert rows["loss"] == "2.9557"
    assert rows["checkpoint"].startswith("step 12, ")


def test_an_attempt_that_was_ended_from_outside_is_said_to_be() -> None:
    assert describe_attempts([attempt("told")]) == (
        "1, 2 ranks on here, ended by SLURM or a signal: exit code 0"
    )
    assert describe_attempts([attempt("failed")]).endswith("ended (failed): exit code 0")
