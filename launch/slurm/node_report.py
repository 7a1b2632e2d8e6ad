"""Have the nodes of a job checked, collect the problems that they found, and decide which nodes are to blame.

The checks themselves are in node_check.py, which srun runs on each node.
"""

import json
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from turnout.launch.slurm.client import SlurmError, srun_command
from turnout.launch.slurm.node_check import CHECKS, Problem
from turnout.launch.slurm.submission import Submission

CHECK_S = 300
# How far the nodes' clocks may differ: they order checkpoints and logs.
CLOCK_S = 5.0


def check_nodes(
    run_dir: Path,
    directory: Path,
    attempt_dir: Path,
    nodes: Sequence[str],
    port: int,
    submission: Submission,
) -> tuple[list[str], list[str]]:
    """Have every node checked; return the nodes to blame and the problems found, one line each.

    Raises SlurmError if no node answers, because then srun has failed.
    """
    (attempt_dir / CHECKS).mkdir()
    arguments = [str(run_dir), str(directory), str(attempt_dir), nodes[0], str(port)]
    command = srun_command(
        nodes,
        "turnout.launch.slurm.node_check",
        arguments,
        log="check",
        options=submission.srun_options,
        kills_on_failure=False,
    )
    began_s = time.time()
    # The nodes connect to this port, on which the first rank will listen later.
    with (
        socket.create_server(("", port), backlog=len(nodes) + 8),
        suppress(subprocess.TimeoutExpired),  # nodes that have not answered are reported below
    ):
        subprocess.run(command, cwd=attempt_dir, timeout=CHECK_S, check=False)
    if not any((attempt_dir / CHECKS).iterdir()):
        raise SlurmError(f"no node answered when it was checked; see {attempt_dir}/check-*.log")
    found = {node: read_answer(attempt_dir, node, began_s, time.time()) for node in nodes}
    return judge(found)


def read_answer(attempt_dir: Path, node: str, began_s: float, ended_s: float) -> list[Problem]:
    """Return the problems that a node found, or that it did not answer, and whether its clock is off.

    began_s, ended_s: when the checks began and ended by the clock of this node, Unix time.
    """
    try:
        answer = json.loads((attempt_dir / CHECKS / f"{node}.json").read_bytes())
    except FileNotFoundError:
        log = attempt_dir / f"check-{node}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        last = f": {lines[-1]}" if lines else ""
        return [Problem("node", f"did not answer; {log}{last}")]
    problems = [Problem(*problem) for problem in answer["problems"]]
    off_s = max(began_s - answer["time_s"], answer["time_s"] - ended_s)
    if off_s > CLOCK_S:
        problems.append(Problem("node", f"its clock is off by {off_s:.0f} s; have the site synchronise it"))
    return problems


def judge(found: dict[str, list[Problem]]) -> tuple[list[str], list[str]]:
    """Return the nodes to blame, and one line for each distinct problem.

    No node is to blame if there is a problem that all share, or if all of several nodes have problems.
    """
    nodes_of: dict[str, list[str]] = {}
    for node, problems in found.items():
        for problem in problems:
            nodes_of.setdefault(problem.message, []).append(node)
    blamed = [node for node, problems in found.items() if any(p.scope == "node" for p in problems)]
    is_shared = any(problem.scope == "all" for problems in found.values() for problem in problems)
    if is_shared or len(blamed) == len(found) > 1:
        blamed = []
    return blamed, [f"node {', '.join(nodes)}: {message}" for message, nodes in nodes_of.items()]
