"""How far a start of a run has come and what its saves and steps took, for who watches it from outside."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

STATUS_FILE = "status.json"  # in logs/start-00001/, written by the first rank

State = Literal["training", "saved", "done"]


@dataclass(frozen=True)
class Status:
    """Where one start of a run stands.

    saved: stopped early, as asked, with this step saved. step: optimizer steps done. longest_gap_s: between
    two looks at the stop file (a step, and what evaluation came between). longest_save_s: until a checkpoint
    had its name; None before the first.
    """

    state: State
    step: int
    longest_gap_s: float
    longest_save_s: float | None


def write_status(start_dir: Path, status: Status) -> None:
    """Leave the status. Not flushed to the disk: training waits for this, and the next one is soon there."""
    part = (start_dir / STATUS_FILE).with_suffix(".tmp")
    part.write_text(json.dumps(asdict(status)), encoding="utf-8")
    part.replace(start_dir / STATUS_FILE)


def read_status(start_dir: Path) -> Status | None:
    """Return the newest status of a start; None where it took no step."""
    try:
        return Status(**json.loads((start_dir / STATUS_FILE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # a power loss may leave half of one
        return None
