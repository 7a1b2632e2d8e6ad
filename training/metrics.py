"""Metrics of a run: metrics.jsonl, which is the record, and accelerate's trackers with the same rows."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnout.data.files import write_atomically

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Row = dict[str, float | int]


class MetricsLog:
    """Writes rows of values named `area/quantity_unit`. Only the first rank has one.

    after_step: the run resumes after this step; later rows, written by an earlier attempt, are deleted.
    """

    def __init__(
        self, run_dir: Path, trackers: Sequence[str], config: Mapping[str, Any], *, after_step: int = 0
    ) -> None:
        path = run_dir / "metrics.jsonl"
        if path.exists():
            write_atomically(path, _rows_until(path, after_step))
        self._file = path.open("a", encoding="utf-8")
        self._trackers = {name: _start_tracker(name, run_dir, config, after_step) for name in trackers}

    def write(self, row: Row) -> None:
        """Append one row; row["step"] is the number of optimizer steps done."""
        # JSON has no infinity, so the norm of a skipped fp16 step becomes null.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        values = {key: value for key, value in row.items() if key != "step"}
        for tracker in self._trackers.values():
            tracker.log(values, step=int(row["step"]))

    def write_text(self, name: str, text: str, step: int) -> None:
        """Write a text to TensorBoard if it is on; the other trackers get numbers only."""
        if (tracker := self._trackers.get("tensorboard")) is not None:
            tracker.writer.add_text(name, text, step)

    def close(self) -> None:
        for tracker in self._trackers.values():
            tracker.finish()
        self._file.close()


def _rows_until(path: Path, step: int) -> bytes:
    """Return the rows up to a step, without a last line that a kill has truncated."""
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return b"".join(line for line in whole if json.loads(line)["step"] <= step)


def _start_tracker(name: str, run_dir: Path, config: Mapping[str, Any], after_step: int) -> "GeneralTracker":
    # Imported here because it imports torch, which is slow and not needed by code that only names a Row.
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        # Without purge_step the points of an earlier attempt would remain beside those of this one.
        tracker = TensorBoardTracker("tensorboard", logging_dir=run_dir, purge_step=after_step + 1)
        tracker.start()
        tracker.writer.add_text("config", "```json\n" + json.dumps(config, indent=2) + "\n```")
        return tracker
    tracker = WandBTracker("turnout", dir=str(run_dir), name=run_dir.name)
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker
