"""The directory in which the ranks of one start of a run tell what becomes of them: RUN/logs/attempt-00001/.

What is in it is made sense of in launch/ranks/failures.py and launch/ranks/attempt_records.py; nothing here needs torch.
"""

import signal
from pathlib import Path

from turnout.training.parallel.flight_recorder import FlightRecord, read_flight_record
from turnout.training.renames import ATTEMPT_DIR, EARLIER_ATTEMPT_DIR

FAILURE_FILES = "rank-*.failure.json"
# Not SIGTERM, by which a cluster tells a whole job to end: a rank then saves before it does.
TOLD_TO_END = signal.SIGUSR2


def make_attempt_dir(logs: Path) -> Path:
    """Make the directory in which the ranks of one start of a run tell what becomes of them.

    Each start has its own: ranks of an earlier one may still run, on a node that was cut off.
    """
    return make_numbered(logs, ATTEMPT_DIR, EARLIER_ATTEMPT_DIR)


def make_numbered(parent: Path, name: str, earlier_name: str = "") -> Path:
    """Make the next directory of a row, as attempt-00003, whoever else makes one at the same time.

    earlier_name: what an earlier release called the first of the row.
    """
    n = 1 + sum(len(list(parent.glob(f"{one}-*"))) for one in (name, earlier_name) if one)
    while True:
        try:
            (directory := parent / f"{name}-{n:05d}").mkdir(parents=True)
            return directory
        except FileExistsError:
            n += 1


def read_flight_records(attempt_dir: Path) -> dict[int, FlightRecord]:
    """Return the ledgers by rank; one that was not finished, as its rank was starting, is left out."""
    views = {}
    for path in sorted(attempt_dir.glob("rank-*.flight")):
        try:
            view = read_flight_record(path)
        except ValueError:
            continue
        views[view.rank] = view
    return views
