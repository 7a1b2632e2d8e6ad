"""The time limit of a job: when it comes, and how long before it the run must begin to save.

TimeLimit is asked every second by launch/slurm/job.py. The margin comes from the steps and saves that the
run itself has measured, which its status files hold (training/run_control.py).
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from turnout.launch.slurm.client import SlurmError
from turnout.training.run_control import read_status

# How often SLURM and the status files are read again: the limit may be changed, and later saves may take
# longer.
REFRESH_S = 60
# How far the clocks of this node and the controller may differ, and how early SLURM may be.
CLOCK_S = 2
# A step and a save may take longer than the longest so far, and the job must still requeue itself.
SAFETY, REQUEUE_S = 1.5, 15.0
# How many attempts count, so that one slow disk does not set the margin for good.
N_RECENT = 10


class TimeLimit:
    """When a job must begin to save.

    end_s      callback returning the job's end as Unix time, None if it has no limit. If SLURM does not
               answer, the previous value is kept.
    margin_s   callback returning the measured margin, None before the first save; warn_s is used then
    """

    def __init__(
        self, end_s: Callable[[], float | None], margin_s: Callable[[], float | None], warn_s: float
    ) -> None:
        self._find_end_s, self._find_margin_s, self._warn_s = end_s, margin_s, warn_s
        self._refreshed_s, self.is_stale = -math.inf, False
        self._end_s, self.margin_s = math.inf, warn_s

    def left_s(self) -> float:
        return self._end_s - time.time()

    def is_reached(self, time_s: float) -> bool:
        """Return whether a moment, in Unix time, is that of the limit or later."""
        return self._end_s - time_s < CLOCK_S

    def is_near(self) -> bool:
        """Return whether it is time to save; refresh first if is_stale is set or REFRESH_S have passed."""
        if self.is_stale or time.monotonic() - self._refreshed_s > REFRESH_S:
            self.refresh()
        return self.left_s() < self.margin_s

    def refresh(self) -> None:
        """Ask SLURM for the end of the job, and compute the margin again."""
        self._refreshed_s, self.is_stale = time.monotonic(), False
        with suppress(OSError, SlurmError):
            end_s = self._find_end_s()
            self._end_s = math.inf if end_s is None else end_s
            margin_s = self._find_margin_s()
            self.margin_s = self._warn_s if margin_s is None else margin_s


def measured_margin_s(attempt_dirs: Sequence[Path]) -> float | None:
    """Return how long before the limit to begin to save, by the longest step and save of the recent attempts.

    attempt_dirs: oldest first. None if none of the recent attempts has saved.
    """
    found = [status for status in map(read_status, attempt_dirs[-N_RECENT:]) if status is not None]
    saves = [status.longest_save_s for status in found if status.longest_save_s is not None]
    if not saves:
        return None
    # Two saves: one may be under way when the last one is asked for.
    return SAFETY * (max(status.longest_gap_s for status in found) + 2 * max(saves)) + REQUEUE_S
