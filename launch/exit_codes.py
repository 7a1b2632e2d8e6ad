"""Exit codes of the command, and which error leads to which code. Scripts rely on these numbers."""

from turnout.data.errors import DataError
from turnout.training.errors import CheckpointError, ConfigError

DONE = 0
OTHER = 1
BAD_CONFIG = 2
BAD_DATA = 3
BAD_CHECKPOINT = 4
STOPPED_EARLY = 75  # saved and ended as asked; --resume continues the run


def exit_code(err: BaseException) -> int:
    if isinstance(err, ConfigError):
        return BAD_CONFIG
    if isinstance(err, DataError):
        return BAD_DATA
    if isinstance(err, CheckpointError):
        return BAD_CHECKPOINT
    return OTHER
