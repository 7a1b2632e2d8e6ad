"""What a job does after an attempt has ended, case by case; this needs no cluster."""

from pathlib import Path

import pytest

from turnout.launch.ranks.attempt_records import AttemptRecord, Begin, Ending, Kind
from turnout.launch.slurm.requeue_policy import MAX_IDLE_ATTEMPTS, MAX_SHORT_ATTEMPTS, decide

MAX_FAILURES = 3


def attempt(kind: Kind | None, *, saved: tuple[int, int] = (0, 0), **ending: object) -> AttemptRecord:
    """Return an attempt between two saved steps; kind None: without an ending."""
    begin = Begin(began_s=0, nodes=("n1", "n2"), n_ranks=2, from_step=saved[0], pid=1)
    fields = {"code": 1, "ended_s": 0.0, "saved_step": saved[1], **ending}
    return AttemptRecord(Path("a"), begin, None if kind is None else Ending(kind, **fields))  # type: ignore[arg-type]


def failed(step: int, why: str = "rank 0: OSError", **rest: object) -> AttemptRecord:
    return attempt("failed", failed_step=step, reasons=(why,), **rest)  # type: ignore[arg-type]


def action(*records: AttemptRecord, is_ended_by_slurm: bool = False) -> str:
    return decide(records, max_failures=MAX_FAILURES, is_ended_by_slurm=is_ended_by_slurm).action


def test_attempts_that_did_not_fail() -> None:
    assert action(attempt("done")) == "finish"
    assert action(attempt("saved", saved=(0, 5))) == "requeue"
    assert action(attempt("saved", saved=(0, 5)), is_ended_by_slurm=True) == "leave", "SLURM decides"
    assert action(attempt("told"), is_ended_by_slurm=True) == "leave"
    assert action(attempt("overtaken")) == "leave"
    assert action(attempt("done"), is_ended_by_slurm=True) == "finish", (
        "nothing is left to do, whoever ended it"
    )


def test_failures_are_counted_only_without_progress() -> None:
    assert action(failed(3)) == "requeue"
    assert action(failed(3), failed(4)) == "requeue"
    assert action(failed(3), failed(4), failed(5)) == "stop"
    progressed = failed(9, saved=(0, 8))
    assert action(failed(3), failed(4), progressed) == "requeue"
    later = [failed(n, saved=(8, 8)) for n in (10, 11, 12)]
    assert action(failed(3), failed(4), progressed, *later[:2]) == "requeue"
    assert action(failed(3), failed(4), progressed, *later) == "stop"
    assert (
        "failure 3 of 3" in decide([progressed, *later], max_failures=3, is_ended_by_slurm=False).explanation
    )


def test_an_attempt_that_slurm_ended_neither_counts_nor_breaks_the_row() -> None:
    ended = attempt("told")
    assert action(failed(3), ended, failed(4), ended, failed(5)) == "stop"
    assert action(failed(3), ended, failed(4)) == "requeue"


def test_the_same_failure_at_the_same_step_stops_at_once() -> None:
    assert action(failed(7), failed(7)) == "stop"
    assert action(failed(7), failed(8)) == "requeue"
    assert action(failed(7), failed(7, "rank 0: MemoryError")) == "requeue"
    assert action(failed(7), attempt("told"), failed(7)) == "stop", "what came between does not matter"
    assert action(failed(7, saved=(0, 5)), failed(7, saved=(5, 5))) == "stop", "nor what was saved"
    assert action(failed(0, saved=(3, 3)), failed(0, saved=(9, 9))) == "requeue", (
        "each failed where it began, at different steps"
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
def test_details_that_differ_between_attempts_do_not_make_another_failure(one: str, other: str) -> None:
    assert action(failed(7, one), failed(7, other)) == "stop"


def test_what_another_attempt_cannot_fix_stops_at_once() -> None:
    assert action(failed(7, is_final=True)) == "stop"
    assert action(attempt("unfit", reasons=("node n1, n2: no room",))) == "stop", "no node is to blame"


def test_a_time_limit_with_room_for_one_step_stops_in_the_end() -> None:
    short = [attempt("saved", saved=(n, n + 1)) for n in range(MAX_SHORT_ATTEMPTS)]
    assert action(*short[1:]) == "requeue"
    assert action(*short) == "stop"
    assert action(*short[:-1], attempt("saved", saved=(4, 6))) == "requeue"


def test_a_bad_node_is_excluded() -> None:
    decision = decide([attempt("unfit", nodes=("n2",))], max_failures=3, is_ended_by_slurm=False)
    assert (decision.action, decision.excluded) == ("requeue", ("n2",))


def test_lost_nodes_are_no_failures_but_do_not_requeue_without_end() -> None:
    lost = attempt("lost", nodes=("n2",))
    assert action(*[lost] * (MAX_IDLE_ATTEMPTS - 1)) == "requeue"
    assert action(*[lost] * MAX_IDLE_ATTEMPTS) == "stop"
    assert action(*[lost] * 5, failed(3)) == "requeue", "the first failure"
    assert action(*[attempt("told")] * MAX_IDLE_ATTEMPTS, lost) == "requeue", "preempted often, lost once"
    cut_off = [attempt(None)] * (MAX_IDLE_ATTEMPTS - 1)  # its node died with it
    assert action(*cut_off, lost) == "stop"
    assert action(*cut_off, attempt("lost", saved=(0, 1), nodes=("n2",))) == "requeue", "it saved a step"


def test_what_an_attempt_without_an_ending_saved_shows_in_the_next_one() -> None:
    moved = [attempt(None), attempt("failed", saved=(6, 6), failed_step=7), failed(8, saved=(6, 6))]
    assert action(*moved) == "requeue"
    assert "failure 2 of 3" in decide(moved, max_failures=3, is_ended_by_slurm=False).explanation
