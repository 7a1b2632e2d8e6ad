"""How an attempt of a run is controlled from outside, by three small files.

    fencing token   RUN/owner             which attempt owns the run directory and may write to it
    stop file       ATTEMPT/stop          asks the ranks of an attempt to save and end
    status file     ATTEMPT/status.json   progress and timings of an attempt, for processes that monitor it

ATTEMPT is RUN/logs/attempt-00001 and so on. The record of how an attempt began and ended is in
launch/ranks/attempt_records.py.

A fencing token names the current owner of something shared, so that an earlier owner is kept from writing to
it. Here it is a random text that names an attempt. It is needed because a job whose node was cut off is
requeued while its old ranks still run. Each attempt therefore writes a new token to RUN/owner and hands it to
its ranks, which compare the two before they commit a checkpoint. A rank of an earlier attempt finds another
token there and stops. The new attempt removes the unfinished checkpoint (training/checkpoint/directory.py).
"""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from turnout.data.files import write_atomically
from turnout.training.errors import TakenOverError

if TYPE_CHECKING:  # imports torch, which is slow and which most users of this module do not need
    from turnout.training.parallel.groups import Groups

OWNER_FILE = "owner"  # in the run directory; an attempt's directory has one, too, with its own token
STOP_FILE = "stop"
STATUS_FILE = "status.json"

State = Literal["training", "saved", "done"]


def take_over(run_dir: Path) -> str:
    """Make a new attempt the owner of the run directory; return its fencing token."""
    token = secrets.token_hex(8)
    write_atomically(run_dir / OWNER_FILE, f"{token}\n".encode())
    return token


class FencingToken:
    """The token of one attempt, and the check that the attempt still owns the run."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self._path, self.token = run_dir / OWNER_FILE, token

    @classmethod
    def of_attempt(cls, run_dir: Path, attempt_dir: Path) -> Self:
        """Return the token that hand_over left, perhaps in another process or on another node."""
        return cls(run_dir, (attempt_dir / OWNER_FILE).read_text(encoding="utf-8").strip())

    def hand_over(self, attempt_dir: Path) -> None:
        """Leave the token in the attempt's directory, for the processes of this attempt only."""
        write_atomically(attempt_dir / OWNER_FILE, f"{self.token}\n".encode())

    def check(self) -> None:
        """Check that this attempt owns the run directory. Raises TakenOverError if a later one does."""
        found = self._path.read_text(encoding="utf-8").strip()
        if found != self.token:
            raise TakenOverError(
                f"{self._path}: another attempt of this run has taken over (token {found}, this one has "
                f"{self.token}); nothing was committed. Let the other one continue"
            )


def ask_to_stop(attempt_dir: Path) -> None:
    """Ask the ranks of an attempt to save at the next step boundary, and end."""
    (attempt_dir / STOP_FILE).touch()


class StopFile:
    """The stop file of one attempt. Only the first rank looks at it.

    A file, not a signal: a signal would reach each rank at a different step, and the launcher and the ranks'
    worker processes too.
    """

    def __init__(self, attempt_dir: Path, groups: "Groups") -> None:
        self._path, self._groups = attempt_dir / STOP_FILE, groups

    def is_there(self) -> bool:
        """Return whether the ranks must stop; the same on all of them. Collective."""
        is_asked = self._groups.is_first and self._path.exists()
        return not self._groups.all_agree(not is_asked)


@dataclass(frozen=True)
class Status:
    """Progress and timings of one attempt.

    state           saved: it stopped early, as asked, after it saved this step
    step            optimizer steps done
    longest_gap_s   between two looks at the stop file: a step, and an evaluation if there was one
    longest_save_s  until a checkpoint had its name; None before the first
    """

    state: State
    step: int
    longest_gap_s: float
    longest_save_s: float | None


def write_status(attempt_dir: Path, status: Status) -> None:
    """Write the status file. It is not flushed, because training waits for this and writes it often."""
    part = (attempt_dir / STATUS_FILE).with_suffix(".tmp")
    part.write_text(json.dumps(asdict(status)), encoding="utf-8")
    part.replace(attempt_dir / STATUS_FILE)


def read_status(attempt_dir: Path) -> Status | None:
    """Return the newest status of an attempt; None if it has not written one."""
    try:
        return Status(**json.loads((attempt_dir / STATUS_FILE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # a power loss may leave half a file
        return None
