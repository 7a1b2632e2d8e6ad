"""How a rank tells why it ended: small files of its own in RUN/logs/attempt-00001/, read by `turnout train`.

    rank-00001.failure.json   what it raised
    rank-00001.ledger         what it was doing (training/parallel/flight_recorder.py)
    rank-00001.stack          where it was when it was told to end, or crashed; empty if it was neither

The exit status of DeepSpeed's launcher is that of whichever failed rank it happened to look at first, so the
cause travels by file: peers that merely lost contact must not hide the rank that knows what went wrong.
"""

import faulthandler
import json
import traceback
from collections.abc import Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from turnout.data.errors import DataError
from turnout.launch.exit_codes import OTHER, exit_code
from turnout.launch.ranks.attempt_dir import FAILURE_FILES, TOLD_TO_END, read_flight_records
from turnout.training.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    EngineError,
    SaveError,
    TakenOverError,
)
from turnout.training.parallel.flight_recorder import FlightRecord
from turnout.training.parallel.hang_report import Ending, explain
from turnout.training.parallel.layout import Layout, name_ranks

# Errors whose own words say it all; others get their type and a pointer to the log.
PLAIN = (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    EngineError,
    OSError,
    SaveError,
    TakenOverError,
)
FINAL = {error.__name__ for error in (CheckpointError, ConfigError, DataError, DivergedError, EngineError)}
# What gloo and NCCL say when another rank is gone, hangs or disagrees. gloo raises bare RuntimeErrors; after
# a time-out, others that wait on the same connection get "Application timeout caused pair closure".
WAITED_IN_VAIN = ("timed out", "Timed out", "Application timeout")
LOST_CONTACT = ("/gloo/", "NCCL", "Connection closed", "Connection reset", *WAITED_IN_VAIN)

TIMED_OUT = "parallel.timeout_s had passed; raise it if nothing hung and a rank was only slow"

CAUSE, ERROR, ECHO = "cause", "error", "echo"


@dataclass(frozen=True)
class Failure:
    """Why one rank ended. kind: CAUSE explains itself; ERROR is the rank's own, and perhaps a bug; ECHO is
    what a rank sees of another's end.
    """

    rank: int
    code: int
    message: str
    kind: str
    error: str = ""  # type of the exception


def describe_failure(err: BaseException, rank: int) -> Failure:
    """Put an exception and its notes (such as the step) in one line."""
    # Imported here because those who read what ranks left need no torch.
    from torch.distributed import DistError

    kind = ERROR
    is_lost = isinstance(err, RuntimeError) and _says_any(str(err), LOST_CONTACT)
    if "EADDRINUSE" in str(err):
        kind = ERROR  # another process took the port of the first rank; starting again takes another
    elif is_lost or isinstance(err, DistError | ConnectionError):
        kind = ECHO
    elif isinstance(err, PLAIN):
        kind = CAUSE
    said = str(err) if kind == CAUSE else ": ".join(filter(None, [type(err).__name__, str(err)]))
    words = [*getattr(err, "__notes__", []), said]
    return Failure(rank, exit_code(err), " ".join(": ".join(words).split()), kind, type(err).__name__)


def record_failure(err: BaseException, rank: int, start: Path) -> int:
    """Leave the failure in the rank's file and its traceback in the rank's log; return the exit code."""
    failure = describe_failure(err, rank)
    with (start.parent / f"rank-{rank:05d}.log").open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(err)))
    whole = start / f"rank-{rank:05d}.failure.json"
    part = whole.with_suffix(".tmp")  # the reader may look at any moment
    part.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    part.rename(whole)
    return failure.code


def leave_stack_behind(file: TextIO) -> None:
    """Have this process write its stack to a file when it crashes, or is told to end, and then end.

    The writing is done by a C signal handler, so also while the process waits in C++ code. The file must stay
    open.
    """
    faulthandler.enable(file)
    faulthandler.register(TOLD_TO_END, file, chain=True)


def explain_failures(
    attempt_dir: Path, layout: Layout, stuck: Set[int] = frozenset()
) -> tuple[int, list[str]]:
    """Return the exit code of a failed run and a few lines that say why; stuck ranks had to be killed."""
    failures = _read_failures(attempt_dir)
    stacks = {
        rank: _read_if_there(attempt_dir / f"rank-{rank:05d}.stack") for rank in range(layout.world_size)
    }
    failures += _crashes(stacks, {f.rank for f in failures})
    causes = [f for f in failures if f.kind == CAUSE]
    if causes:
        return causes[0].code, _by_message(causes)
    errors = [f for f in failures if f.kind == ERROR]
    views = read_flight_records(attempt_dir)
    endings = _endings(layout, {f.rank for f in failures}, stacks, views, stuck)
    is_lost = any(endings[rank] in (Ending.GONE, Ending.STUCK) for rank in views)
    # A rank that raised an error of its own needs no ledger to be found, unless another vanished before it.
    blamed = explain(views, layout, endings) if is_lost or not errors else []
    if blamed and any(_says_any(f.message, WAITED_IN_VAIN) for f in failures):
        blamed.append(TIMED_OUT)
    return OTHER, blamed + _by_message(errors) or _by_message(failures)


def is_final(attempt_dir: Path) -> bool:
    """Return whether another start would fail in the same way: a user must mend it, or a guard stops."""
    return any(f.kind == CAUSE and f.error in FINAL for f in _read_failures(attempt_dir))


def _says_any(message: str, phrases: tuple[str, ...]) -> bool:
    return any(words in message for words in phrases)


def _read_failures(attempt_dir: Path) -> list[Failure]:
    failures = []
    for path in sorted(attempt_dir.glob(FAILURE_FILES)):
        with suppress(ValueError, TypeError):  # a node that lost its power may leave half of one
            failures.append(Failure(**json.loads(path.read_bytes())))
    return failures


def _by_message(failures: list[Failure]) -> list[str]:
    """Return one line for each distinct reason."""
    ranks_of: dict[str, list[int]] = {}
    for failure in sorted(failures, key=lambda f: f.rank):
        ranks_of.setdefault(failure.message, []).append(failure.rank)
    return [f"{name_ranks(ranks)}: {message}" for message, ranks in ranks_of.items()]


def _read_if_there(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _crashes(stacks: dict[int, str], failed: Set[int]) -> list[Failure]:
    """Return the ranks that a fatal signal ended, each with its name."""
    found = []
    for rank, stack in stacks.items():
        first = stack.partition("\n")[0]
        if rank not in failed and first.startswith("Fatal Python error: "):
            name = first.removeprefix("Fatal Python error: ")
            # NCCL aborts a process whose peer does not come.
            kind = ECHO if name == "Aborted" else ERROR
            message = f"crashed: {name}; rank-{rank:05d}.stack shows where"
            found.append(Failure(rank, OTHER, message, kind))
    return found


def _endings(
    layout: Layout, failed: Set[int], stacks: dict[int, str], views: dict[int, FlightRecord], stuck: Set[int]
) -> dict[int, Ending]:
    endings = {}
    for rank in range(layout.world_size):
        if rank in failed:
            endings[rank] = Ending.FAILED
        elif stacks[rank]:
            endings[rank] = Ending.TOLD
        elif rank in stuck:
            endings[rank] = Ending.STUCK
        elif rank in views and views[rank].has_ended:
            endings[rank] = Ending.DONE
        else:
            endings[rank] = Ending.GONE
    return endings
