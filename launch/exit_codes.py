"""What an exit code says, and which error leads to which. Scripts rely on these numbers."""

from turnout.data.errors import DataError
from turnout.training.errors import CheckpointError, ConfigError

DONE = 0
OTHER = 1
BAD_CONFIG = 2
BAD_DATA = 3
BAD_CHECKPOINT = 4
STOPPED_EARLY = 75  # saved as asked; --resume goes on


def exit_code(err: BaseException) -> int:
    if isinstance(err, ConfigError):
        return BAD_CONFIG
    if isinstance(err, DataError):
        return BAD_DATA
    if isinstance(err, CheckpointError):
        return BAD_CHECKPOINT
    return OTHER
