"""Who may write to a run directory: the latest start of the run, and no earlier one.

A job whose node was cut off is requeued while its old ranks still run. Each start therefore writes a token of
its own to RUN/owner and hands it to its ranks, which look before they commit a checkpoint. A stale rank finds
another's token, and stops; its unfinished directory is gone by then, too (training/checkpoint_dir.py).
"""

import secrets
from pathlib import Path
from typing import Self

from data.files import write_atomically
from training.errors import TakenOverError

OWNER_FILE = "owner"  # in the run directory; each start keeps its own token under the same name


def take_over(run_dir: Path) -> str:
    """Make this start the owner of the run directory; return its token."""
    token = secrets.token_hex(8)
    write_atomically(run_dir / OWNER_FILE, f"{token}\n".encode())
    return token


class Owner:
    """One start of a run."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self._path, self.token = run_dir / OWNER_FILE, token

    @classmethod
    def of_start(cls, run_dir: Path, start_dir: Path) -> Self:
        """Return a start that has taken over before, perhaps in another process or on another node."""
        return cls(run_dir, (start_dir / OWNER_FILE).read_text(encoding="utf-8").strip())

    def hand_to(self, start_dir: Path) -> None:
        """Leave the token where all processes of this start, and only they, look for it."""
        write_atomically(start_dir / OWNER_FILE, f"{self.token}\n".encode())

    def check(self) -> None:
        """Raise TakenOverError where a later start owns the run directory."""
        found = self._path.read_text(encoding="utf-8").strip()
        if found != self.token:
            raise TakenOverError(
                f"{self._path}: another start of this run has taken over (token {found}, this one has "
                f"{self.token}); nothing was committed. Let that one go on"
            )
