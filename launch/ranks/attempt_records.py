"""The record of each attempt at a run, in RUN/logs/attempt-00001/.

begin.json     where it began, on which nodes, from which step
status.json    its progress, written by the first rank (training/run_control.py)
ending.json    how it ended; absent while it runs, and never written if its node was lost
"""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from turnout.data.files import write_atomically
from turnout.launch.exit_codes import DONE, OTHER, STOPPED_EARLY
from turnout.launch.ranks.attempt_dir import read_flight_records
from turnout.launch.ranks.failures import explain_failures, is_final
from turnout.launch.ranks.launcher import RanksOutcome
from turnout.training.checkpoint.directory import list_checkpoints, step_of
from turnout.training.parallel.layout import Layout
from turnout.training.renames import ATTEMPT_DIR, EARLIER_ATTEMPT_DIR
from turnout.training.run_control import read_status

BEGIN_FILE, ENDING_FILE = "begin.json", "ending.json"

# done: took all steps. saved: saved and stopped early, as asked. failed: an error. told: SLURM ended the
# job before it could save. lost: a node went away. unfit: nodes did not pass the checks, so no rank was
# started. overtaken: a later attempt has claimed the run.
Kind = Literal["done", "saved", "failed", "told", "lost", "unfit", "overtaken"]
CODES: dict[Kind, int] = {"done": DONE, "saved": STOPPED_EARLY}


@dataclass(frozen=True)
class Begin:
    """How an attempt began.

    began_s     Unix time
    from_step   step of the newest checkpoint, 0 without one
    job_id, restart, submission   of the SLURM job; empty outside SLURM
    """

    began_s: float
    nodes: tuple[str, ...]
    n_ranks: int
    from_step: int
    pid: int
    job_id: str = ""
    restart: int = 0
    submission: str = ""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    code           exit code of the command or the job
    saved_step     step of the newest checkpoint at that moment, 0 without one
    failed_step    step in which the ranks were when one failed
    is_final       another attempt would fail in the same way: a wrong setting, wrong data, a guard that stops
    nodes          nodes that failed their checks, or were lost
    action, decision   what a SLURM job did next (launch/slurm/requeue_policy.py), and why
    """

    kind: Kind
    code: int
    ended_s: float
    saved_step: int
    failed_step: int | None = None
    is_final: bool = False
    reasons: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    action: str = ""
    decision: str = ""

    @property
    def cause(self) -> str:
        """Return the first reason without what differs between attempts: position, tokens, addresses."""
        first = next(iter(self.reasons), "").partition("; last seen")[0]
        return re.sub(r"\b(0x)?[0-9a-f]{8,}\b|\d{5,}", "*", first)


@dataclass(frozen=True)
class AttemptRecord:
    """What the directory of an attempt says about it. ending: None while it runs, or if its node was lost."""

    directory: Path
    begin: Begin
    ending: Ending | None


def begin_here(n_ranks: int, from_step: int, nodes: Sequence[str], **job: Any) -> Begin:
    """Return the beginning of an attempt that this process starts now. job: the SLURM fields of Begin."""
    return Begin(time.time(), tuple(nodes), n_ranks, from_step, os.getpid(), **job)


def ending(kind: Kind, run_dir: Path, reasons: Sequence[str] = (), **rest: Any) -> Ending:
    """Return the ending of an attempt that has ended now. rest: further fields of Ending."""
    code = rest.pop("code", CODES.get(kind, OTHER))
    return Ending(kind, code, time.time(), newest_step(run_dir), reasons=tuple(reasons), **rest)


def conclude(run_dir: Path, attempt_dir: Path, layout: Layout, outcome: RanksOutcome) -> Ending:
    """Return how an attempt ended, judged by the files that its ranks left."""
    status = read_status(attempt_dir)
    if outcome.is_done and status is not None and status.state != "training":
        return ending(status.state, run_dir)
    code, reasons = explain_failures(attempt_dir, layout, outcome.stuck)
    steps = [
        record.current.step
        for record in read_flight_records(attempt_dir).values()
        if record.current is not None
    ]
    return ending(
        "failed",
        run_dir,
        reasons,
        code=code,
        failed_step=max(steps, default=0),
        is_final=is_final(attempt_dir),
    )


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint by name, 0 if there is none."""
    return max(map(step_of, list_checkpoints(run_dir)), default=0)


def write_begin(attempt_dir: Path, begin: Begin) -> None:
    write_atomically(attempt_dir / BEGIN_FILE, _to_json(begin))


def write_ending(attempt_dir: Path, ending: Ending) -> None:
    write_atomically(attempt_dir / ENDING_FILE, _to_json(ending))


def read_attempts(run_dir: Path) -> list[AttemptRecord]:
    """Return the attempts at a run, oldest first, including those that an earlier release recorded."""
    records, logs = [], run_dir / "logs"
    for directory in (path for name in (EARLIER_ATTEMPT_DIR, ATTEMPT_DIR) for path in logs.glob(f"{name}-*")):
        if begin := _read(directory / BEGIN_FILE):
            end = _read(directory / ENDING_FILE)
            records.append(AttemptRecord(directory, Begin(**begin), Ending(**end) if end else None))
    # By time: an earlier release that goes on with the run does not count the attempts of this one.
    return sorted(records, key=lambda record: (record.begin.began_s, record.directory.name))


def _read(path: Path) -> dict[str, Any]:
    """Return the fields of a record, none if it is absent or damaged."""
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # a power loss may leave half of one
        return {}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}


def _to_json(record: Begin | Ending) -> bytes:
    return (json.dumps(asdict(record), indent=2) + "\n").encode()
