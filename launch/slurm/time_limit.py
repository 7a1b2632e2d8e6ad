"""The time limit of a job: when it is, and when to begin to save before it."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from turnout.launch.slurm.client import SlurmError
from turnout.training.run_control import read_status

# A limit may be changed while the job runs, and a later save take longer.
LIMIT_EVERY_S = 60
# By which the clocks of this node and the controller may differ, and SLURM be early.
CLOCK_S = 2


class Limit:
    """When a job must begin to save: before its time limit, by what its run's own steps and saves took.

    end_s: asks when the limit is reached, Unix time, None without one; where SLURM does not answer, what it
    said before stands. margin_s: asks for the seconds measured so far, None before there are any; warn_s then
    stands for them.
    """

    def __init__(
        self, end_s: Callable[[], float | None], margin_s: Callable[[], float | None], warn_s: float
    ) -> None:
        self._ask_end_s, self._ask_margin_s, self._warn_s = end_s, margin_s, warn_s
        self._asked_s, self.is_stale = -math.inf, False
        self._end_s, self.margin_s = math.inf, warn_s

    def left_s(self) -> float:
        return self._end_s - time.time()

    def is_reached(self, time_s: float) -> bool:
        """Return whether a moment, in Unix time, is that of the limit, or later."""
        return self._end_s - time_s < CLOCK_S

    def is_near(self) -> bool:
        """Return whether it is time to save; ask again now and then, and where is_stale says so."""
        if self.is_stale or time.monotonic() - self._asked_s > LIMIT_EVERY_S:
            self.ask()
        return self.left_s() < self.margin_s

    def ask(self) -> None:
        self._asked_s, self.is_stale = time.monotonic(), False
        with suppress(OSError, SlurmError):
            end_s = self._ask_end_s()
            self._end_s = math.inf if end_s is None else end_s
            margin_s = self._ask_margin_s()
            self.margin_s = self._warn_s if margin_s is None else margin_s


# A step and a save may take longer than the longest so far, and the job must still requeue itself.
SAFETY, REQUEUE_S = 1.5, 15.0
# Of so many starts: a disk that was slow once does not count for ever.
N_RECENT = 10


def measured_margin_s(attempt_dirs: Sequence[Path]) -> float | None:
    """Return the seconds that the longest gap between two step boundaries and the longest save ask for.

    start_dirs: oldest first. None where none of the recent ones has saved.
    """
    found = [status for status in map(read_status, attempt_dirs[-N_RECENT:]) if status is not None]
    saves = [status.longest_save_s for status in found if status.longest_save_s is not None]
    if not saves:
        return None
    # Two saves: one may be under way when the last one is asked for.
    return SAFETY * (max(status.longest_gap_s for status in found) + 2 * max(saves)) + REQUEUE_S
