"""Where a run's numbers go: metrics.jsonl, which is the record, and accelerate's trackers fed from the same
rows.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

Row = dict[str, float | int]


class MetricsLog:
    """Writes rows of `area/quantity_unit` numbers. Only the first rank has one."""

    def __init__(self, run_dir: Path, trackers: Sequence[str], config: Mapping[str, Any]) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._trackers = [_start_tracker(name, run_dir, config) for name in trackers]

    def write(self, row: Row) -> None:
        """Append one row; row["step"] counts optimizer steps done."""
        # JSON has no infinity: the norm of a skipped fp16 step is null.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        values = {key: value for key, value in row.items() if key != "step"}
        for tracker in self._trackers:
            tracker.log(values, step=int(row["step"]))

    def write_text(self, name: str, text: str, step: int) -> None:
        """Hand a text to TensorBoard where it is on; other trackers get numbers only."""
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.writer.add_text(name, text, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        self._file.close()


def _start_tracker(name: str, run_dir: Path, config: Mapping[str, Any]) -> GeneralTracker:
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", logging_dir=run_dir)
        tracker.start()
        tracker.writer.add_text("config", "```json\n" + json.dumps(config, indent=2) + "\n```")
        return tracker
    tracker = WandBTracker("turnout", dir=str(run_dir), name=run_dir.name)
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker
