"""What a job does after a start has ended, case by case; no cluster is needed for that."""

from pathlib import Path

import pytest

from turnout.launch.ranks.attempt_records import AttemptRecord, Begin, Ending, Kind
from turnout.launch.slurm.requeue_policy import MAX_IDLE_STARTS, MAX_SHORT_STARTS, decide

MAX_FAILURES = 3


def start(kind: Kind | None, *, saved: tuple[int, int] = (0, 0), **ending: object) -> AttemptRecord:
    """Return a start between two saved steps, without an ending where kind is None."""
    begin = Begin(began_s=0, nodes=("n1", "n2"), n_ranks=2, from_step=saved[0], pid=1)
    fields = {"code": 1, "ended_s": 0.0, "saved_step": saved[1], **ending}
    return AttemptRecord(Path("start"), begin, None if kind is None else Ending(kind, **fields))  # type: ignore[arg-type]


def failed(step: int, why: str = "rank 0: OSError", **rest: object) -> AttemptRecord:
    return start("failed", failed_step=step, reasons=(why,), **rest)  # type: ignore[arg-type]


def action(*records: AttemptRecord, is_told: bool = False) -> str:
    return decide(records, max_failures=MAX_FAILURES, is_told=is_told).action


def test_what_ended_well_or_from_outside() -> None:
    assert action(start("done")) == "finish"
    assert action(start("saved", saved=(0, 5))) == "requeue"
    assert action(start("saved", saved=(0, 5)), is_told=True) == "leave", "SLURM decides"
    assert action(start("told"), is_told=True) == "leave"
    assert action(start("overtaken")) == "leave"
    assert action(start("done"), is_told=True) == "finish", "nothing is left to do, told or not"


def test_failures_are_counted_only_without_progress() -> None:
    assert action(failed(3)) == "requeue"
    assert action(failed(3), failed(4)) == "requeue"
    assert action(failed(3), failed(4), failed(5)) == "stop"
    progressed = failed(9, saved=(0, 8))
    assert action(failed(3), failed(4), progressed) == "requeue"
    later = [failed(n, saved=(8, 8)) for n in (10, 11, 12)]
    assert action(failed(3), failed(4), progressed, *later[:2]) == "requeue"
    assert action(failed(3), failed(4), progressed, *later) == "stop"
    assert "failure 3 of 3" in decide([progressed, *later], max_failures=3, is_told=False).words


def test_a_start_that_was_told_to_end_neither_counts_nor_breaks_the_row() -> None:
    told = start("told")
    assert action(failed(3), told, failed(4), told, failed(5)) == "stop"
    assert action(failed(3), told, failed(4)) == "requeue"


def test_the_same_failure_at_the_same_step_stops_at_once() -> None:
    assert action(failed(7), failed(7)) == "stop"
    assert action(failed(7), failed(8)) == "requeue"
    assert action(failed(7), failed(7, "rank 0: MemoryError")) == "requeue"
    assert action(failed(7), start("told"), failed(7)) == "stop", "what came between does not matter"
    assert action(failed(7, saved=(0, 5)), failed(7, saved=(5, 5))) == "stop", "nor what was saved"
    assert action(failed(0, saved=(3, 3)), failed(0, saved=(9, 9))) == "requeue", (
        "both as they began, not at a step"
    )
    assert action(failed(0, saved=(9, 9)), failed(0, saved=(9, 9))) == "stop"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("at 0x7f12aa34bb56", "at 0x7e99aa34bb00"),
        ("step-00000010.0123456789abcdef.tmp/rank", "step-00000010.fedcba9876543210.tmp/rank"),
        ("rank 1 hung; last seen in step 7, forward", "rank 1 hung; last seen in step 7, backward"),
        ("port 29512", "port 31001"),
    ],
)
def test_what_differs_from_start_to_start_does_not_make_another_failure(one: str, other: str) -> None:
    assert action(failed(7, one), failed(7, other)) == "stop"


def test_what_another_start_cannot_mend_stops_at_once() -> None:
    assert action(failed(7, is_final=True)) == "stop"
    assert action(start("unfit", reasons=("node n1, n2: no room",))) == "stop", "no node is to blame"


def test_a_limit_without_room_for_more_than_a_step_stops_in_the_end() -> None:
    short = [start("saved", saved=(n, n + 1)) for n in range(MAX_SHORT_STARTS)]
    assert action(*short[1:]) == "requeue"
    assert action(*short) == "stop"
    assert action(*short[:-1], start("saved", saved=(4, 6))) == "requeue"


def test_a_bad_node_is_kept_away_from() -> None:
    decision = decide([start("unfit", nodes=("n2",))], max_failures=3, is_told=False)
    assert (decision.action, decision.excluded) == ("requeue", ("n2",))


def test_lost_nodes_are_no_failures_but_do_not_requeue_for_ever() -> None:
    lost = start("lost", nodes=("n2",))
    assert action(*[lost] * (MAX_IDLE_STARTS - 1)) == "requeue"
    assert action(*[lost] * MAX_IDLE_STARTS) == "stop"
    assert action(*[lost] * 5, failed(3)) == "requeue", "the first failure"
    assert action(*[start("told")] * MAX_IDLE_STARTS, lost) == "requeue", "preempted often, lost once"
    cut_off = [start(None)] * (MAX_IDLE_STARTS - 1)  # its node died with it
    assert action(*cut_off, lost) == "stop"
    assert action(*cut_off, start("lost", saved=(0, 1), nodes=("n2",))) == "requeue", "it saved a step"


def test_what_a_start_without_an_ending_saved_shows_in_the_next_one() -> None:
    moved = [start(None), start("failed", saved=(6, 6), failed_step=7), failed(8, saved=(6, 6))]
    assert action(*moved) == "requeue"
    assert "failure 2 of 3" in decide(moved, max_failures=3, is_told=False).words
