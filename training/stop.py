"""A run asked to stop: a file that outsiders make, seen by all ranks at the same step boundary.

A file, and no signal: a signal reaches each rank at another step, and its launcher and workers besides.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only asks need not wait for torch
    from training.parallel import Groups

STOP_FILE = "stop"


def ask_to_stop(start_dir: Path) -> None:
    """Ask the ranks of one start of a run to save at the next step boundary, and end."""
    (start_dir / STOP_FILE).touch()


class StopFile:
    """The file of one start, looked at by the first rank alone."""

    def __init__(self, start_dir: Path, groups: "Groups") -> None:
        self._path, self._groups = start_dir / STOP_FILE, groups

    def is_there(self) -> bool:
        """Return whether the ranks are to stop; the same on all of them. Collective."""
        is_asked = self._groups.is_first and self._path.exists()
        return not self._groups.all_agree(not is_asked)
