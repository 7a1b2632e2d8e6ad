"""One node of a job: `python -m turnout.launch.slurm.node RUN_DIR START_DIR`, a task of srun, starts the node's ranks."""

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
    """What all nodes of a start must know. module: what each rank runs."""

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
    """Return the ranks, of all nodes, that had to be killed."""
    found = [json.loads(path.read_bytes()) for path in attempt_dir.glob(STUCK_FILES)]
    return {rank for ranks in found for rank in ranks}


def main() -> None:
    run_dir, attempt_dir = Path(sys.argv[1]), Path(sys.argv[2])
    # A warning that was sent to all processes instead of the batch script alone must not end the ranks,
    # which inherit this.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    plan = JobPlan(**json.loads((attempt_dir / PLAN_FILE).read_bytes()))
    node_rank = plan.nodes.index(os.environ["SLURMD_NODENAME"])
    node = NodePlan(plan.nodes, node_rank, plan.nproc, plan.nodes[0], plan.master_port, plan.has_gpus)
    try:
        fencing_token = FencingToken.of_attempt(run_dir, attempt_dir)
        ended = launch_ranks(run_dir, attempt_dir, node, plan.module, fencing_token=fencing_token)
    except TakenOverError as err:
        sys.exit(f"turnout: {err}")
    if ended.stuck:
        write_atomically(
            attempt_dir / f"node-{node_rank:05d}.stuck", json.dumps(sorted(ended.stuck)).encode()
        )
    # No failure of this task, even where the ranks failed: srun would end the other nodes' tasks, and wake a
    # rank that is stopped, before it was seen which one hung. What the ranks left tells how it went.


if __name__ == "__main__":
    main()
