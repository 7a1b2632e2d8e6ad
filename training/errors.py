"""Exceptions that a user can cause or needs to see, and `printable`, which makes text safe to show."""


class ConfigError(ValueError):
    """A setting is wrong; the message says which, its value, and the way out."""


class EngineError(RuntimeError):
    """The engine computed a wrong gradient or norm; no setting of the user is to blame."""


class DivergedError(RuntimeError):
    """A non-finite loss or norm, a spike, or a collapse. The update was not applied; the run must stop."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or from another run; the message names the file and the reason."""


class UnreadableError(CheckpointError):
    """A file of a checkpoint could not be read; its contents may be intact."""


class UnknownVersionError(CheckpointError):
    """A checkpoint has a format that this release does not know. It may be intact."""


class TakenOverError(RuntimeError):
    """A later attempt of the run owns its directory; this one must not write there any more."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


class ExportError(RuntimeError):
    """An export differs from the model it was made from; it was removed."""


def printable(text: str, n_chars: int = 300) -> str:
    """Return untrusted text in a form that is safe on one line of a terminal, at most n_chars long."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:n_chars])
    return shown + (".." if len(text) > n_chars else "")
