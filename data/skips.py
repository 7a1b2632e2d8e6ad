"""The data that a run leaves out: windows of data steps, and the file that records them.

batch(step) of data/loader.py is a pure function of a data step. Without skipped windows an optimizer step
reads the data step of its own number; each window shifts all later steps past it. The windows form a set: the
order in which they were found does not matter.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from turnout.data.errors import DataError
from turnout.data.files import write_atomically

FORMAT_VERSION = 1


@dataclass(frozen=True, order=True)
class SkippedWindow:
    """Data steps first to last, both left out."""

    first: int
    last: int
    reason: str

    def __post_init__(self) -> None:
        if type(self.first) is not int or type(self.last) is not int or type(self.reason) is not str:
            raise TypeError(f"{self} needs two integers and a text")
        if not 0 <= self.first <= self.last:
            raise ValueError(f"{self} needs 0 <= first <= last")


def data_step_at(step: int, skipped: Sequence[SkippedWindow]) -> int:
    """Return the data step that an optimizer step reads, from 0: the step-th outside all windows.

    Windows may overlap, touch and come in any order.
    """
    assert step >= 0
    data_step, n_passed = step, 0  # all data steps below n_passed have been counted or left out
    for window in sorted(skipped):
        if window.first > data_step:
            break
        data_step += max(0, window.last + 1 - max(window.first, n_passed))
        n_passed = max(n_passed, window.last + 1)
    return data_step


def merged(a: Iterable[SkippedWindow], b: Iterable[SkippedWindow]) -> tuple[SkippedWindow, ...]:
    """Return the windows of both, sorted, each once."""
    return tuple(sorted({*a, *b}))


def write_skips(path: Path, windows: Iterable[SkippedWindow]) -> None:
    content = {"format_version": FORMAT_VERSION, "skipped": [asdict(window) for window in windows]}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_skips(path: Path) -> tuple[SkippedWindow, ...]:
    """Return the windows in the order of the file, none if there is no file.

    Raises DataError for a damaged file or one of another version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        values = json.loads(content)
        found = values["format_version"]
        if found == FORMAT_VERSION:
            return tuple(SkippedWindow(**window) for window in values["skipped"])
    except (ValueError, KeyError, TypeError) as err:
        # Training without it would silently read what was left out on purpose.
        raise DataError(
            f"{path}: damaged ({type(err).__name__}: {err}); restore it from a copy, or delete it to train "
            "on all data"
        ) from err
    raise DataError(f"{path}: format_version={found} where {FORMAT_VERSION} is read; use the newer turnout")
