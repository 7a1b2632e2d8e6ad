"""The errors of training that a user can cause or must hear of, and the words of others in them. What raises
them is elsewhere.
"""


class ConfigError(ValueError):
    """A setting is wrong; the message says which, its value, and the way out."""


class EngineError(RuntimeError):
    """The engine did not do what it promises; nothing the user set is to blame."""


class DivergedError(RuntimeError):
    """Training went wrong: not finite, a spike, a collapse. The update was not applied, the run must stop."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the message says which file, and why."""


class UnreadableError(CheckpointError):
    """A file of a checkpoint could not be read. What is in it may be intact."""


class TakenOverError(RuntimeError):
    """A later start of the run owns its directory; this one must not write there any more."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are as they were."""


class ExportError(RuntimeError):
    """What was written is not the model it was written from; it was removed."""


def printable(text: str, n_chars: int = 300) -> str:
    """Return a stranger's words fit for one line of a terminal."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:n_chars])
    return shown + (".." if len(text) > n_chars else "")
