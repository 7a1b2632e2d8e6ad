"""When a job begins to save before its time limit, by the steps and saves that its run has measured."""

import time
from pathlib import Path

import pytest

from turnout.launch.slurm.job import locate_ranks
from turnout.launch.slurm.node import JobPlan
from turnout.launch.slurm.time_limit import N_RECENT, REQUEUE_S, SAFETY, TimeLimit, measured_margin_s
from turnout.training.run_control import Status, write_status


def test_the_margin_covers_the_longest_step_and_save_of_all_attempts(tmp_path: Path) -> None:
    attempt_dirs = []
    for name, status in {
        "one": Status("training", 10, longest_gap_s=2.0, longest_save_s=None),
        "two": Status("saved", 20, longest_gap_s=1.0, longest_save_s=8.0),
        "three": Status("saved", 30, longest_gap_s=0.5, longest_save_s=3.0),
    }.items():
        attempt_dirs.append(tmp_path / name)
        attempt_dirs[-1].mkdir()
        write_status(attempt_dirs[-1], status)
    assert measured_margin_s(attempt_dirs[:1]) is None, "no attempt has saved yet"
    assert measured_margin_s([*attempt_dirs, tmp_path]) == SAFETY * (2.0 + 2 * 8.0) + REQUEUE_S
    assert measured_margin_s([*attempt_dirs, *N_RECENT * [tmp_path]]) is None, "long ago"


@pytest.mark.parametrize(
    ("left_s", "measured_s", "is_near"),
    [
        (None, 1000.0, False),
        (100.0, 50.0, False),
        (40.0, 50.0, True),
        (100.0, None, True),
        (400.0, None, False),
    ],
    ids=["no limit", "measured: far", "measured: near", "not measured: near", "not measured: far"],
)
def test_a_job_stops_in_time(left_s: float | None, measured_s: float | None, is_near: bool) -> None:
    end_s = None if left_s is None else time.time() + left_s
    assert TimeLimit(lambda: end_s, lambda: measured_s, warn_s=300).is_near() == is_near


def test_the_limit_is_reached_when_slurm_says_so() -> None:
    times_s = [time.time() + 100]
    limit = TimeLimit(lambda: times_s[0], lambda: None, warn_s=300)
    assert not limit.is_reached(times_s[0]), "SLURM was not asked yet"
    limit.refresh()
    assert limit.is_reached(times_s[0]) and not limit.is_reached(times_s[0] - 50)
    times_s[0] -= 50
    assert limit.is_near() and not limit.is_reached(times_s[0]), "SLURM was asked a moment ago"
    limit.is_stale = True
    assert limit.is_near() and limit.is_reached(times_s[0])


def test_the_nodes_of_blamed_ranks_are_named() -> None:
    plan = JobPlan(("n1", "n2", "n5"), nproc=2, has_gpus=False, master_port=1, module="m")
    assert locate_ranks(["ranks 0, 1, 5: no room", "rank 3 waited"], plan) == [
        "ranks 0, 1 ran on n1; rank 5 ran on n5"
    ]
    assert locate_ranks(["the disk is full"], plan) == []
    assert locate_ranks([], plan) == []
