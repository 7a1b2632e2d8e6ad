"""The directory in which the ranks of one start of a run tell what becomes of them: RUN/logs/start-00001/.

What is in it is made sense of in launch/ranks/failures.py and launch/ranks/start_records.py; nothing here needs torch.
"""

import signal
from pathlib import Path

from turnout.training.parallel.flight_recorder import LedgerView, read_ledger

FAILURE_FILES = "rank-*.failure.json"
# Not SIGTERM, by which a cluster tells a whole job to end: a rank then saves before it does.
TOLD_TO_END = signal.SIGUSR2


def make_start_dir(logs: Path) -> Path:
    """Make the directory in which the ranks of one start of a run tell what becomes of them.

    Each start has its own: ranks of an earlier one may still run, on a node that was cut off.
    """
    return make_numbered(logs, "start")


def make_numbered(parent: Path, name: str) -> Path:
    """Make the next directory of a row, as start-00003, whoever else makes one at the same time."""
    n = 1 + len(list(parent.glob(f"{name}-*")))
    while True:
        try:
            (directory := parent / f"{name}-{n:05d}").mkdir(parents=True)
            return directory
        except FileExistsError:
            n += 1


def read_ledgers(start_dir: Path) -> dict[int, LedgerView]:
    """Return the ledgers by rank; one that was not finished, as its rank was starting, is left out."""
    views = {}
    for path in sorted(start_dir.glob("rank-*.ledger")):
        try:
            view = read_ledger(path)
        except ValueError:
            continue
        views[view.rank] = view
    return views
