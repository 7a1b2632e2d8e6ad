"""The directory of one attempt, RUN/logs/attempt-00001/, in which its ranks report.

launch/ranks/failures.py and launch/ranks/attempt_records.py interpret its files. Nothing here needs torch.
"""

import signal
from pathlib import Path

from turnout.training.parallel.flight_recorder import FlightRecord, read_flight_record
from turnout.training.renames import ATTEMPT_DIR, EARLIER_ATTEMPT_DIR

FAILURE_FILES = "rank-*.failure.json"
# Ends a rank, which writes its stack first. Not SIGTERM, with which a cluster ends a whole job: on SIGTERM
# a rank must have time to save.
END_SIGNAL = signal.SIGUSR2


def make_attempt_dir(logs: Path) -> Path:
    """Make the next attempt's directory.

    Each attempt has its own, because ranks of an earlier one may still run on a node that was cut off.
    """
    return make_numbered(logs, ATTEMPT_DIR, EARLIER_ATTEMPT_DIR)


def make_numbered(parent: Path, name: str, earlier_name: str = "") -> Path:
    """Make the next directory of a numbered series, such as attempt-00003; safe against concurrent callers.

    earlier_name: what an earlier release called the directories of this series; they are counted, too.
    """
    n = 1 + sum(len(list(parent.glob(f"{one}-*"))) for one in (name, earlier_name) if one)
    while True:
        try:
            (directory := parent / f"{name}-{n:05d}").mkdir(parents=True)
            return directory
        except FileExistsError:
            n += 1


def read_flight_records(attempt_dir: Path) -> dict[int, FlightRecord]:
    """Return the flight records by rank, without those that a starting rank has not finished creating."""
    records = {}
    for path in sorted(attempt_dir.glob("rank-*.flight")):
        try:
            record = read_flight_record(path)
        except ValueError:
            continue
        records[record.rank] = record
    return records
