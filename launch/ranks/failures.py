"""Why ranks ended: each writes small files to RUN/logs/attempt-00001/, and the command explains them.

    rank-00001.failure.json   what it raised
    rank-00001.flight         what it was doing (training/parallel/flight_recorder.py)
    rank-00001.stack          its stack when it crashed or was ended by END_SIGNAL; otherwise empty

DeepSpeed's launcher exits with the status of whichever failed rank it looked at first. The cause is therefore
reported by file: peers that merely lost contact must not hide the rank that knows what went wrong.
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
from turnout.launch.ranks.attempt_dir import END_SIGNAL, FAILURE_FILES, read_flight_records
from turnout.training.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    EngineError,
    SaveError,
    TakenOverError,
)
from turnout.training.parallel.flight_recorder import FlightRecord
from turnout.training.parallel.hang_report import RankEnding, explain
from turnout.training.parallel.layout import Layout, name_ranks

# Errors whose messages are complete; the message of any other error is reported with its type.
SELF_EXPLANATORY = (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    EngineError,
    OSError,
    SaveError,
    TakenOverError,
)
# Another attempt would fail in the same way.
FINAL = {error.__name__ for error in (CheckpointError, ConfigError, DataError, DivergedError, EngineError)}
# What gloo and NCCL say when another rank is gone, hangs or disagrees. gloo raises bare RuntimeErrors; after
# a time-out, others that wait on the same connection get "Application timeout caused pair closure".
TIMED_OUT = ("timed out", "Timed out", "Application timeout")
LOST_CONTACT = ("/gloo/", "NCCL", "Connection closed", "Connection reset", *TIMED_OUT)

TIMEOUT_HINT = "parallel.timeout_s had passed; raise it if nothing hung and a rank was only slow"

CAUSE, ERROR, ECHO = "cause", "error", "echo"


@dataclass(frozen=True)
class Failure:
    """Why one rank ended.

    kind    CAUSE: an error that explains itself. ERROR: another error of the rank's own, perhaps a bug.
            ECHO: the rank only noticed that another one ended.
    error   type of the exception
    """

    rank: int
    code: int
    message: str
    kind: str
    error: str = ""


def describe_failure(err: BaseException, rank: int) -> Failure:
    """Return an exception and its notes (such as the step) as one line."""
    # Imported here because only a rank needs torch, not the command that reads its files.
    from torch.distributed import DistError

    kind = ERROR
    is_lost = isinstance(err, RuntimeError) and _contains_any(str(err), LOST_CONTACT)
    if "EADDRINUSE" in str(err):
        kind = ERROR  # another process took the first rank's port; the next attempt chooses another one
    elif is_lost or isinstance(err, DistError | ConnectionError):
        kind = ECHO
    elif isinstance(err, SELF_EXPLANATORY):
        kind = CAUSE
    message = str(err) if kind == CAUSE else ": ".join(filter(None, [type(err).__name__, str(err)]))
    parts = [*getattr(err, "__notes__", []), message]
    return Failure(rank, exit_code(err), " ".join(": ".join(parts).split()), kind, type(err).__name__)


def record_failure(err: BaseException, rank: int, attempt_dir: Path) -> int:
    """Write the failure to the rank's file and the traceback to the rank's log; return the exit code."""
    failure = describe_failure(err, rank)
    with (attempt_dir.parent / f"rank-{rank:05d}.log").open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(err)))
    whole = attempt_dir / f"rank-{rank:05d}.failure.json"
    part = whole.with_suffix(".tmp")  # the command may read at any moment
    part.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    part.rename(whole)
    return failure.code


def write_stack_at_end(file: TextIO) -> None:
    """Have this process write its stack to a file when it crashes or receives END_SIGNAL, and then end.

    A C signal handler writes it, so this works even while the process waits in C++ code. The file must stay
    open.
    """
    faulthandler.enable(file)
    faulthandler.register(END_SIGNAL, file, chain=True)


def explain_failures(
    attempt_dir: Path, layout: Layout, stuck: Set[int] = frozenset()
) -> tuple[int, list[str]]:
    """Return the exit code of a failed attempt and a few lines that say why; stuck ranks had to be killed."""
    failures = _read_failures(attempt_dir)
    stacks = {
        rank: _read_if_there(attempt_dir / f"rank-{rank:05d}.stack") for rank in range(layout.world_size)
    }
    failures += _crashes(stacks, {f.rank for f in failures})
    causes = [f for f in failures if f.kind == CAUSE]
    if causes:
        return causes[0].code, _by_message(causes)
    errors = [f for f in failures if f.kind == ERROR]
    records = read_flight_records(attempt_dir)
    endings = _endings(layout, {f.rank for f in failures}, stacks, records, stuck)
    is_lost = any(endings[rank] in (RankEnding.DIED, RankEnding.STUCK) for rank in records)
    # An error of a rank's own explains the failure without a hang report, unless another rank vanished
    # before.
    blamed = explain(records, layout, endings) if is_lost or not errors else []
    if blamed and any(_contains_any(f.message, TIMED_OUT) for f in failures):
        blamed.append(TIMEOUT_HINT)
    return OTHER, blamed + _by_message(errors) or _by_message(failures)


def is_final(attempt_dir: Path) -> bool:
    """Return whether another attempt would fail in the same way: the user must act, or a guard stops it."""
    return any(f.kind == CAUSE and f.error in FINAL for f in _read_failures(attempt_dir))


def _contains_any(message: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in message for phrase in phrases)


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
    """Return a failure, with the name of the signal, for each rank that a fatal signal ended."""
    found = []
    for rank, stack in stacks.items():
        first = stack.partition("\n")[0]
        if rank not in failed and first.startswith("Fatal Python error: "):
            name = first.removeprefix("Fatal Python error: ")
            # NCCL aborts a process whose peer does not enter a collective.
            kind = ECHO if name == "Aborted" else ERROR
            message = f"crashed: {name}; rank-{rank:05d}.stack shows where"
            found.append(Failure(rank, OTHER, message, kind))
    return found


def _endings(
    layout: Layout,
    failed: Set[int],
    stacks: dict[int, str],
    records: dict[int, FlightRecord],
    stuck: Set[int],
) -> dict[int, RankEnding]:
    endings = {}
    for rank in range(layout.world_size):
        if rank in failed:
            endings[rank] = RankEnding.FAILED
        elif stacks[rank]:
            endings[rank] = RankEnding.TERMINATED
        elif rank in stuck:
            endings[rank] = RankEnding.STUCK
        elif rank in records and records[rank].has_ended:
            endings[rank] = RankEnding.DONE
        else:
            endings[rank] = RankEnding.DIED
    return endings
