"""What a job does after an attempt at its run has ended: a pure function of the attempts' records.

It judges by what the ranks left behind, never by srun's exit code, which is that of whichever task was
killed last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turnout.launch.ranks.attempt_records import AttemptRecord, Ending

# Losing a node is nobody's fault, but a run that makes no progress must not be requeued without end.
MAX_IDLE_ATTEMPTS = 10
# Neither must a run whose time limit leaves hardly any time beside its saves.
MAX_SHORT_ATTEMPTS = 5

# finish: nothing is left to do. requeue: continue when there is room. leave: whether the run continues is
# decided by SLURM, by a later attempt or by the next job of a chain. stop: a person must look.
Action = Literal["finish", "requeue", "leave", "stop"]


@dataclass(frozen=True)
class Decision:
    """explanation: one line for the log. excluded: nodes to keep away from."""

    action: Action
    explanation: str
    excluded: tuple[str, ...] = ()


def decide(records: Sequence[AttemptRecord], *, max_failures: int, is_ended_by_slurm: bool) -> Decision:
    """Return what to do after the last of a submission's attempts, which has just ended.

    is_ended_by_slurm: SLURM ends the job (cancelled, preempted, requeued), so SLURM decides what follows.
    False if it ends the job only because of the time limit.
    """
    end = records[-1].ending
    assert end is not None, "the last attempt has just ended"
    if end.kind == "done":
        return Decision("finish", "the run is finished")
    if end.kind == "overtaken":
        return Decision("leave", "another attempt continues the run")
    if is_ended_by_slurm:
        saved = f"step {end.saved_step} is saved"
        return Decision("leave", f"ended by SLURM, which decides what follows; {saved}")
    if end.kind == "saved":
        last = records[-MAX_SHORT_ATTEMPTS:]
        if len(last) == MAX_SHORT_ATTEMPTS and all(map(_is_short, last)):
            return Decision(
                "stop", f"{len(last)} attempts in a row had time for one step: raise --time. Stopped"
            )
        return Decision("requeue", f"saved at step {end.saved_step}: requeued to continue")
    if end.is_final:
        return Decision("stop", "another attempt would fail in the same way: stopped")
    idle = idle_attempts(records)
    if end.kind == "failed":
        return _after_failure(end, records, [r for r in idle if _kind(r) == "failed"], max_failures)
    if len(idle) >= MAX_IDLE_ATTEMPTS:
        return Decision("stop", f"{len(idle)} attempts in a row saved nothing: stopped")
    if end.kind == "unfit":
        if not end.nodes:
            return Decision("stop", "no node is to blame, so other nodes would not help: stopped")
        return Decision("requeue", f"requeued away from {', '.join(end.nodes)}", end.nodes)
    return Decision("requeue", f"lost {', '.join(end.nodes)}: requeued, not counted as a failure")


def _after_failure(
    end: Ending, records: Sequence[AttemptRecord], failures: Sequence[AttemptRecord], max_failures: int
) -> Decision:
    before = next((r for r in reversed(records[:-1]) if _kind(r) == "failed"), None)
    if before is not None and _failure(before) == _failure(records[-1]):
        return Decision("stop", f"the same failure at step {end.failed_step} twice: stopped")
    if len(failures) >= max_failures:
        return Decision("stop", f"failure {len(failures)} of {max_failures} without progress: stopped")
    if not failures:
        return Decision("requeue", f"failed, but step {end.saved_step} was saved since it began: requeued")
    return Decision("requeue", f"failure {len(failures)} of {max_failures} without progress: requeued")


def idle_attempts(records: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """Return the latest attempts in a row that added no checkpoint, newest first.

    Attempts that SLURM ended are left out, and do not end the row: they show nothing about the run.
    """
    idle: list[AttemptRecord] = []
    newest = None
    for record in reversed(records):
        # What an attempt without an ending has saved shows in the step from which the next one began.
        saved = record.ending.saved_step if record.ending else newest
        newest = record.begin.from_step
        if saved is not None and saved > record.begin.from_step:
            break
        if _kind(record) not in ("told", "saved"):
            idle.append(record)
    return idle


def _is_short(record: AttemptRecord) -> bool:
    end = record.ending
    return end is not None and end.kind == "saved" and end.saved_step <= record.begin.from_step + 1


def _failure(record: AttemptRecord) -> tuple[int, str]:
    """Return the step and the cause of a failure; an attempt that took no step failed where it began."""
    assert record.ending is not None
    return max(record.ending.failed_step or 0, record.begin.from_step), record.ending.cause


def _kind(record: AttemptRecord) -> str:
    return record.ending.kind if record.ending else "lost"
