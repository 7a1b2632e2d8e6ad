"""How a rank tells why it ended: one small file per rank in the run's logs/, read by `turnout train`.

The exit status of DeepSpeed's launcher is that of whichever failed rank it happened to look at first, so the
cause travels by file: peers that merely lost contact must not hide the rank that knows what went wrong.
"""

import json
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from data.errors import DataError
from launch.exit_codes import OTHER, exit_code
from training.errors import ConfigError, NonFiniteError
from training.parallel import name_ranks

# Errors whose own words say it all; others get their type and a pointer to the log.
PLAIN = (ConfigError, DataError, NonFiniteError, OSError)


@dataclass(frozen=True)
class Failure:
    """Why one rank ended. is_cause: False for what may be only the echo of another rank's end."""

    rank: int
    code: int
    message: str
    is_cause: bool


def describe_failure(err: BaseException, rank: int) -> Failure:
    """Put an exception and its notes (such as the step) in one line."""
    is_cause = isinstance(err, PLAIN) and not isinstance(err, ConnectionError)
    words = [*getattr(err, "__notes__", []), str(err) if is_cause else f"{type(err).__name__}: {err}"]
    return Failure(rank, exit_code(err), " ".join(": ".join(words).split()), is_cause)


def record_failure(err: BaseException, rank: int, logs: Path) -> int:
    """Leave the failure in the rank's file and its traceback in the rank's log; return the exit code."""
    failure = describe_failure(err, rank)
    with (logs / f"rank-{rank:05d}.log").open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(err)))
    (logs / f"rank-{rank:05d}.failure.json").write_text(json.dumps(asdict(failure)), encoding="utf-8")
    return failure.code


def explain_failures(logs: Path, nproc: int) -> tuple[int, list[str]]:
    """Return the exit code of a failed run and one line for each distinct reason."""
    failures = [
        Failure(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(logs.glob("*.failure.json"))
    ]
    told = [f for f in failures if f.is_cause] or failures
    ranks_of: dict[str, list[int]] = {}
    for failure in told:
        ranks_of.setdefault(failure.message, []).append(failure.rank)
    lines = [f"{name_ranks(ranks)}: {message}" for message, ranks in ranks_of.items()]
    silent = sorted(set(range(nproc)) - {f.rank for f in failures})
    if silent and not any(f.is_cause for f in failures):
        lines.insert(0, f"{name_ranks(silent)} ended without a word: killed, or out of memory")
    return (told[0].code if told else OTHER), lines
