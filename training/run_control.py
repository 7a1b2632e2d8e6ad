"""Who may write to a run directory: the latest start of the run, and no earlier one.

A job whose node was cut off is requeued while its old ranks still run. Each start therefore writes a token of
its own to RUN/owner and hands it to its ranks, which look before they commit a checkpoint. A stale rank finds
another's token, and stops; its unfinished directory is gone by then, too (training/checkpoint/directory.py).
"""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from turnout.data.files import write_atomically
from turnout.training.errors import TakenOverError

if TYPE_CHECKING:  # who only asks need not wait for torch
    from turnout.training.parallel.groups import Groups

OWNER_FILE = "owner"  # in the run directory; each start keeps its own token under the same name


def take_over(run_dir: Path) -> str:
    """Make this start the owner of the run directory; return its token."""
    token = secrets.token_hex(8)
    write_atomically(run_dir / OWNER_FILE, f"{token}\n".encode())
    return token


class FencingToken:
    """One start of a run."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self._path, self.token = run_dir / OWNER_FILE, token

    @classmethod
    def of_attempt(cls, run_dir: Path, attempt_dir: Path) -> Self:
        """Return a start that has taken over before, perhaps in another process or on another node."""
        return cls(run_dir, (attempt_dir / OWNER_FILE).read_text(encoding="utf-8").strip())

    def hand_over(self, attempt_dir: Path) -> None:
        """Leave the token where all processes of this start, and only they, look for it."""
        write_atomically(attempt_dir / OWNER_FILE, f"{self.token}\n".encode())

    def check(self) -> None:
        """Raise TakenOverError where a later start owns the run directory."""
        found = self._path.read_text(encoding="utf-8").strip()
        if found != self.token:
            raise TakenOverError(
                f"{self._path}: another start of this run has taken over (token {found}, this one has "
                f"{self.token}); nothing was committed. Let that one go on"
            )


STOP_FILE = "stop"


def ask_to_stop(attempt_dir: Path) -> None:
    """Ask the ranks of one start of a run to save at the next step boundary, and end."""
    (attempt_dir / STOP_FILE).touch()


class StopFile:
    """The file of one start, looked at by the first rank alone."""

    def __init__(self, attempt_dir: Path, groups: "Groups") -> None:
        self._path, self._groups = attempt_dir / STOP_FILE, groups

    def is_there(self) -> bool:
        """Return whether the ranks are to stop; the same on all of them. Collective."""
        is_asked = self._groups.is_first and self._path.exists()
        return not self._groups.all_agree(not is_asked)


STATUS_FILE = "status.json"  # in logs/attempt-00001/, written by the first rank

State = Literal["training", "saved", "done"]


@dataclass(frozen=True)
class Status:
    """Where one start of a run stands.

    saved: stopped early, as asked, with this step saved. step: optimizer steps done. longest_gap_s: between
    two looks at the stop file (a step, and what evaluation came between). longest_save_s: until a checkpoint
    had its name; None before the first.
    """

    state: State
    step: int
    longest_gap_s: float
    longest_save_s: float | None


def write_status(attempt_dir: Path, status: Status) -> None:
    """Leave the status. Not flushed to the disk: training waits for this, and the next one is soon there."""
    part = (attempt_dir / STATUS_FILE).with_suffix(".tmp")
    part.write_text(json.dumps(asdict(status)), encoding="utf-8")
    part.replace(attempt_dir / STATUS_FILE)


def read_status(attempt_dir: Path) -> Status | None:
    """Return the newest status of a start; None where it took no step."""
    try:
        return Status(**json.loads((attempt_dir / STATUS_FILE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # a power loss may leave half of one
        return None
