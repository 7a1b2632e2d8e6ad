"""One rank of `turnout train` whose loss goes wrong, or which waits, when certain samples come.

The environment variable SABOTAGE holds JSON: the faults, a directory in which each rank records the samples
of its micro-batches, and the seconds by which each rank's part of a save is delayed.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import turnout.training.checkpoint.saver
import turnout.training.engine.build
from turnout.data.loader import Batch
from turnout.launch.ranks.rank import main
from turnout.moe.load_balancing import RouterState
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.objective import Objective, ObjectiveSums

SABOTAGE = "TURNOUT_TEST_SABOTAGE"
FACTORS = {"nan": float("nan"), "spike": 100.0, "hold": 1.0}


@dataclass(frozen=True)
class Fault:
    """What happens in the batch that holds a sample, and the file that gets a line each time.

    nan, spike: the loss is multiplied. hold: the rank waits until the file `MARK.release` exists.
    """

    kind: Literal["nan", "spike", "hold"]
    sample_id: int
    mark: str

    def fire(self) -> float:
        """Leave a mark, wait if the fault is a hold, and return the factor for the loss."""
        with Path(self.mark).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        while self.kind == "hold" and not Path(f"{self.mark}.release").exists():
            time.sleep(0.02)
        return FACTORS[self.kind]


class SabotagedObjective(Objective):
    def forward(self, batch: Batch, router_state: RouterState) -> ObjectiveSums:
        sums, sabotage = super().forward(batch, router_state), json.loads(os.environ[SABOTAGE])
        sample_ids = batch.sample_ids.tolist()
        with (Path(sabotage["seen"]) / f"rank-{os.environ['RANK']}").open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(sample_ids)}\n")
        for fault in (Fault(**fault) for fault in sabotage["faults"]):
            if fault.sample_id in sample_ids:
                factor = fault.fire()
                sums = replace(sums, total=sums.total * factor, nll=sums.nll * factor)
        return sums


class SlowDisk(Disk):
    def boundary(self, name: str, path: Path) -> None:
        if name == "report":
            time.sleep(json.loads(os.environ[SABOTAGE])["slower_s"])


if __name__ == "__main__":
    turnout.training.checkpoint.saver.Disk = SlowDisk  # type: ignore[misc]
    turnout.training.engine.build.Objective = SabotagedObjective  # type: ignore[misc]
    main()
