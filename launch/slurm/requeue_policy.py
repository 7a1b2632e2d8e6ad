"""What a job does after a start of its run has ended: a pure function of the record.

Judged by what the ranks left behind, never by srun's exit code, which is that of whichever task was killed
last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turnout.launch.ranks.attempt_records import AttemptRecord, Ending

# A node that goes away is nobody's fault, but a run that gets nowhere is not put back for ever.
MAX_IDLE_STARTS = 10
# Nor is one whose time limit leaves no room beside what its saves have taken.
MAX_SHORT_STARTS = 5

# finish: nothing is left to do. requeue: go on when there is room. leave: SLURM or a later start goes on, if
# anything does. stop: a person must look.
Action = Literal["finish", "requeue", "leave", "stop"]


@dataclass(frozen=True)
class Decision:
    """words: one line for the log. excluded: nodes to keep away from."""

    action: Action
    words: str
    excluded: tuple[str, ...] = ()


def decide(records: Sequence[AttemptRecord], *, max_failures: int, is_told: bool) -> Decision:
    """Return what to do after the last of a submission's starts, which has just ended.

    is_told: SLURM has told the job to end (cancelled, preempted, requeued, out of time), so it decides.
    """
    end = records[-1].ending
    assert end is not None, "the last start has just ended"
    if end.kind == "done":
        return Decision("finish", "the run is finished")
    if end.kind == "overtaken":
        return Decision("leave", "another start of the run goes on")
    if is_told:
        saved = f"step {end.saved_step} is saved"
        return Decision("leave", f"told to end by SLURM, which decides what follows; {saved}")
    if end.kind == "saved":
        last = records[-MAX_SHORT_STARTS:]
        if len(last) == MAX_SHORT_STARTS and all(map(_is_short, last)):
            return Decision(
                "stop", f"{len(last)} starts in a row had time for one step: raise --time. Stopped"
            )
        return Decision("requeue", f"saved at step {end.saved_step}: requeued to go on")
    if end.is_final:
        return Decision("stop", "another start would fail in the same way: stopped")
    idle = idle_starts(records)
    if end.kind == "failed":
        return _after_failure(end, records, [r for r in idle if _kind(r) == "failed"], max_failures)
    if len(idle) >= MAX_IDLE_STARTS:
        return Decision("stop", f"{len(idle)} starts in a row saved nothing: stopped")
    if end.kind == "unfit":
        if not end.nodes:
            return Decision("stop", "no node is to blame, so that others would do no better: stopped")
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


def idle_starts(records: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """Return the last starts in a row after which no newer checkpoint was there, newest first.

    Starts that were told to end are passed over: they say nothing of the run.
    """
    idle: list[AttemptRecord] = []
    newest = None
    for record in reversed(records):
        # What a start without an ending saved shows in where the next one began.
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
    """Return at which step a start failed, and of what; one that took no step failed where it began."""
    assert record.ending is not None
    return max(record.ending.failed_step or 0, record.begin.from_step), record.ending.cause


def _kind(record: AttemptRecord) -> str:
    return record.ending.kind if record.ending else "lost"
