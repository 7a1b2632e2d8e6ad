"""What the nodes of a job found when they were checked, and which of them are to blame."""

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
# What clocks may differ by: checkpoints and logs are ordered by them.
CLOCK_S = 5.0


def check_nodes(
    run_dir: Path,
    directory: Path,
    attempt_dir: Path,
    nodes: Sequence[str],
    port: int,
    submission: Submission,
) -> tuple[list[str], list[str]]:
    """Have every node checked; return those to blame, and what is wrong in words, none if nothing is.

    Raises SlurmError where none answers: that is srun's doing.
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
    # What listens here answers for the first rank, which will listen on this port.
    with (
        socket.create_server(("", port), backlog=len(nodes) + 8),
        suppress(subprocess.TimeoutExpired),  # those that have not answered are told of below
    ):
        subprocess.run(command, cwd=attempt_dir, timeout=CHECK_S, check=False)
    if not any((attempt_dir / CHECKS).iterdir()):
        raise SlurmError(f"no node answered when it was checked; see {attempt_dir}/check-*.log")
    found = {node: read_answer(attempt_dir, node, began_s, time.time()) for node in nodes}
    return judge(found)


def read_answer(attempt_dir: Path, node: str, began_s: float, ended_s: float) -> list[Problem]:
    """Return what a node found wrong, or that it did not answer; its clock is compared with this one's."""
    try:
        answer = json.loads((attempt_dir / CHECKS / f"{node}.json").read_bytes())
    except FileNotFoundError:
        log = attempt_dir / f"check-{node}.log"
        said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        last = f": {said[-1]}" if said else ""
        return [Problem("node", f"did not answer; {log}{last}")]
    problems = [Problem(*problem) for problem in answer["problems"]]
    off_s = max(began_s - answer["time_s"], answer["time_s"] - ended_s)
    if off_s > CLOCK_S:
        problems.append(Problem("node", f"its clock is off by {off_s:.0f} s; have the site synchronise it"))
    return problems


def judge(found: dict[str, list[Problem]]) -> tuple[list[str], list[str]]:
    """Return the nodes to blame and all reasons, each once; where all of several are, none of them is."""
    reasons: dict[str, list[str]] = {}
    for node, problems in found.items():
        for problem in problems:
            reasons.setdefault(problem.words, []).append(node)
    blamed = [node for node, problems in found.items() if any(p.of == "node" for p in problems)]
    is_shared = any(problem.of == "all" for problems in found.values() for problem in problems)
    if is_shared or len(blamed) == len(found) > 1:
        blamed = []
    return blamed, [f"node {', '.join(nodes)}: {words}" for words, nodes in reasons.items()]
