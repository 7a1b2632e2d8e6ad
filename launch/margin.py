"""How long before its time limit a job must begin to save, from what the run itself has measured."""

from collections.abc import Sequence
from pathlib import Path

from training.status import read_status

# A step and a save may take longer than the longest so far, and the job must still requeue itself.
SAFETY, REQUEUE_S = 1.5, 15.0
# Of so many starts: a disk that was slow once does not count for ever.
N_RECENT = 10


def measured_margin_s(start_dirs: Sequence[Path]) -> float | None:
    """Return the seconds that the longest gap between two step boundaries and the longest save ask for.

    start_dirs: oldest first. None where none of the recent ones has saved.
    """
    found = [status for status in map(read_status, start_dirs[-N_RECENT:]) if status is not None]
    saves = [status.longest_save_s for status in found if status.longest_save_s is not None]
    if not saves:
        return None
    # Two saves: one may be under way when the last one is asked for.
    return SAFETY * (max(status.longest_gap_s for status in found) + 2 * max(saves)) + REQUEUE_S
