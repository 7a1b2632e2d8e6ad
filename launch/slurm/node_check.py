"""The checks that a node must pass before ranks start on it. srun runs this once on each node:

    python -m turnout.launch.slurm.node_check RUN_DIR SUBMISSION ATTEMPT_DIR HEAD PORT

It writes the problems that it finds to ATTEMPT_DIR/checks/NODE.json; node_report.py collects them. It
imports no torch, so it answers within a second.
"""

import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turnout.data.files import sha256_of, write_atomically
from turnout.data.manifest import MANIFEST_FILE
from turnout.launch.slurm.submission import RECIPE_FILE, Submission, code_sha256, read_submission
from turnout.launch.versions import package_versions

CHECKS = "checks"  # in the attempt's directory, with a file from each node
CONNECT_S = 10
GPU_S = 120
# A running build does not renew its lock, so only the lock's age tells that it was killed: no build takes
# so long.
STALE_LOCK_S = 1800


@dataclass(frozen=True)
class Problem:
    """scope: node if the node is to blame, all if the problem lies in something that all nodes share."""

    scope: Literal["node", "all"]
    message: str


def find_problems(run_dir: Path, directory: Path, head: str, port: int) -> Iterator[Problem]:
    """Yield what is wrong on this node. directory: the submission's. head, port: where the ranks meet."""
    submission = read_submission(directory)
    yield from disk_problems(run_dir, submission)
    yield from code_problems(directory, submission)
    yield from corpus_problems(directory)
    yield from connection_problems(head, port)
    yield from lock_problems()
    if submission.has_gpus:
        yield from gpu_problems(submission.ranks_per_node)


def disk_problems(run_dir: Path, submission: Submission) -> Iterator[Problem]:
    probe = run_dir / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as err:
        is_full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        yield Problem("all" if is_full else "node", f"cannot write to {run_dir}: {err.strerror}")
    free = shutil.disk_usage(run_dir).free
    if free < submission.n_bytes:
        gib = 2**30
        yield Problem(
            "all",
            f"{run_dir} has {free / gib:.2f} GiB free, "
            f"and a checkpoint takes {submission.n_bytes / gib:.2f}; "
            "make room, or see turnout checkpoint prune",
        )


def code_problems(directory: Path, submission: Submission) -> Iterator[Problem]:
    """Yield what differs on this node from the code, recipe and package versions that were submitted."""
    if platform.python_version() != submission.python:
        yield Problem("node", f"has Python {platform.python_version()}, not {submission.python}")
    found = package_versions()
    for name, version in submission.packages.items():
        if found.get(name) != version:
            yield Problem("node", f"has {name} {found.get(name)}, not {version}")
    if code_sha256(directory) != submission.code_sha256:
        yield Problem("all", f"{directory / 'code'} is not as it was when the job was submitted")
    if sha256_of(directory / RECIPE_FILE) != submission.recipe_sha256:
        yield Problem("all", f"{directory / RECIPE_FILE} is not as it was when the job was submitted")


def corpus_problems(directory: Path) -> Iterator[Problem]:
    recipe = tomllib.loads((directory / RECIPE_FILE).read_text(encoding="utf-8"))
    manifest = Path(recipe["data"]["corpus"]) / MANIFEST_FILE
    try:
        manifest.read_bytes()
    except OSError as err:
        yield Problem("node", f"cannot read the corpus: {manifest}: {err.strerror}")


def connection_problems(head: str, port: int) -> Iterator[Problem]:
    try:
        socket.create_connection((head, port), timeout=CONNECT_S).close()
    except OSError as err:
        yield Problem("node", f"cannot reach {head}, port {port}, where the ranks meet: {err}")


def lock_problems() -> Iterator[Problem]:
    """Yield locks that a killed build of an extension left; the next build would wait for them endlessly."""
    default = Path.home() / ".cache" / "torch_extensions"
    builds = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    for lock in builds.rglob("lock") if builds.is_dir() else ():
        age_s = time.time() - lock.stat().st_mtime
        if age_s > STALE_LOCK_S:
            yield Problem("node", f"{lock} is {age_s / 3600:.1f} h old: a build was killed; remove it")


def gpu_problems(n_wanted: int) -> Iterator[Problem]:
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as err:
        yield Problem("node", f"torch cannot count the GPUs: {err}")
        return
    if int(done.stdout) < n_wanted:
        yield Problem("node", f"torch sees {int(done.stdout)} GPUs, not {n_wanted}")


def main() -> None:
    run_dir, directory, attempt_dir, head = (*map(Path, sys.argv[1:4]), sys.argv[4])
    problems = list(find_problems(run_dir, directory, head, int(sys.argv[5])))
    node = os.environ["SLURMD_NODENAME"]
    for problem in problems:
        print(f"{node}: {problem.message}", flush=True)
    answer = {
        "time_s": time.time(),
        "problems": [[problem.scope, problem.message] for problem in problems],
    }
    write_atomically(attempt_dir / CHECKS / f"{node}.json", json.dumps(answer).encode())


if __name__ == "__main__":
    main()
