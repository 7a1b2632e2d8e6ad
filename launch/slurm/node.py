"""Start the ranks of one node of a job. srun runs this once on each node:

    python -m turnout.launch.slurm.node RUN_DIR ATTEMPT_DIR

The job (launch/slurm/job.py) writes plan.json for all nodes to the attempt's directory. Each node writes
there which of its ranks had to be killed.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from turnout.data.files import write_atomically
from turnout.launch.ranks.launcher import NodePlan, launch_ranks
from turnout.launch.slurm.submission import Submission
from turnout.training.errors import TakenOverError
from turnout.training.run_control import FencingToken

PLAN_FILE = "plan.json"
STUCK_FILES = "node-*.stuck"


@dataclass(frozen=True)
class JobPlan:
    """What every node of an attempt needs to know. module: what each rank runs."""

    nodes: tuple[str, ...]
    nproc: int
    has_gpus: bool
    master_port: int
    module: str


def write_plan(attempt_dir: Path, plan: JobPlan) -> None:
    write_atomically(attempt_dir / PLAN_FILE, json.dumps(asdict(plan)).encode())


def plan_nodes(nodes: Sequence[str], submission: Submission, master_port: int, module: str) -> JobPlan:
    return JobPlan(tuple(nodes), submission.ranks_per_node, submission.has_gpus, master_port, module)


def read_stuck(attempt_dir: Path) -> set[int]:
    """Return the ranks on all nodes that had to be killed."""
    found = [json.loads(path.read_bytes()) for path in attempt_dir.glob(STUCK_FILES)]
    return {rank for ranks in found for rank in ranks}


def main() -> None:
    run_dir, attempt_dir = Path(sys.argv[1]), Path(sys.argv[2])
    # SLURM's warning is for the batch script. If it was sent to all processes, it must not end the ranks,
    # which inherit this.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    plan = JobPlan(**json.loads((attempt_dir / PLAN_FILE).read_bytes()))
    node_rank = plan.nodes.index(os.environ["SLURMD_NODENAME"])
    node = NodePlan(plan.nodes, node_rank, plan.nproc, plan.nodes[0], plan.master_port, plan.has_gpus)
    try:
        fencing_token = FencingToken.of_attempt(run_dir, attempt_dir)
        outcome = launch_ranks(run_dir, attempt_dir, node, plan.module, fencing_token=fencing_token)
    except TakenOverError as err:
        sys.exit(f"turnout: {err}")
    if outcome.stuck:
        write_atomically(
            attempt_dir / f"node-{node_rank:05d}.stuck", json.dumps(sorted(outcome.stuck)).encode()
        )
    # Exit with 0 even if ranks failed. Otherwise srun would end the other nodes' tasks, and wake a stopped
    # rank, before they found out which rank hung. The job judges by the files of the ranks.


if __name__ == "__main__":
    main()
