"""Run SLURM's own commands: questions about jobs and nodes, submitting, requeueing, and srun's command line.

Each command has a time limit, and its failure is a SlurmError. What to do about a job is decided elsewhere
(submit.py, job.py, requeue_policy.py).
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from turnout.training.errors import ConfigError, printable

COMMAND_S = 60
N_TRIES, BETWEEN_TRIES_S = 10, 30  # a controller that is being restarted is back within minutes
REACH_S = 3


class SlurmError(RuntimeError):
    """A command of SLURM is missing, failed or did not answer."""


def run_command(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Return what a command prints. Raises SlurmError if it is missing, fails or does not answer."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except FileNotFoundError as err:
        raise SlurmError(
            f"{command[0]} is not installed here; use a machine from which jobs are submitted"
        ) from err
    except subprocess.TimeoutExpired as err:
        raise SlurmError(f"{command[0]} did not answer within {COMMAND_S} s; ask the site") from err
    if done.returncode:
        raise SlurmError(printable(f"{' '.join(command[:2])}: {' '.join(done.stderr.split())}"))
    return done.stdout


# ---- questions about jobs ----


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it. directory: the one from which it was submitted."""

    job_id: str
    state: str
    reason: str
    time_left: str
    nodes: str
    directory: str


def queued_jobs(*options: str) -> list[QueuedJob]:
    """Return the waiting and running jobs that squeue's options select."""
    shown = run_command("squeue", "--noheader", *options, "--format=%i %T|%r|%L|%N|%Z")
    # Another user's directory may hold line breaks; what remains of such a name matches no run.
    found = re.findall(r"(?m)^(\S+) (\w+)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|(.*)$", shown)
    return [QueuedJob(*fields) for fields in found]


def jobs_of(run_dir: Path) -> list[QueuedJob]:
    """Return this user's waiting and running jobs of a run directory."""
    return [
        job for job in queued_jobs("--me") if os.path.realpath(job.directory) == os.path.realpath(run_dir)
    ]


def find_job(job_id: str) -> QueuedJob | None:
    """Return a job, or None if it has ended or never existed."""
    return next((job for job in queued_jobs("--me") if job.job_id == job_id), None)


def end_time_s(job_id: str) -> float | None:
    """Return when a job reaches its time limit, in Unix time; None without a limit."""
    with suppress(ValueError):
        return datetime.fromisoformat(
            run_command("squeue", "--noheader", f"--jobs={job_id}", "--format=%e").strip()
        ).timestamp()
    return None


# ---- questions about nodes ----


def hostnames(node_list: str) -> tuple[str, ...]:
    """Return the nodes of a list such as n[1-2]."""
    return tuple(run_command("scontrol", "show", "hostnames", node_list).split())


def unreachable_nodes(nodes: Sequence[str]) -> list[str]:
    """Return the nodes whose SLURM daemon does not answer; SLURM itself notices only minutes later."""
    return [node for node in nodes if not _is_reachable(node)]


def _is_reachable(node: str) -> bool:
    shown = run_command("scontrol", "--oneliner", "show", "node", node)
    address, port = re.search(r"\bNodeAddr=(\S+)", shown), re.search(r"\bPort=(\d+)", shown)
    default = re.search(r"SlurmdPort\s*=\s*(\d+)", run_command("scontrol", "show", "config"))
    number = port or default
    if address is None or number is None:
        return True  # unknown: nothing speaks against it
    try:
        socket.create_connection((address[1], int(number[1])), timeout=REACH_S).close()
    except OSError:
        return False
    return True


# ---- submit and requeue ----


# Variables that are not named after their option, and variables that would turn the job into something else.
_OTHER_VARIABLES = {"SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU"}
_OTHER_VARIABLES |= {"SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_TEST_ONLY", "SBATCH_IGNORE_PBS"}


def sbatch(script: Path, run_dir: Path, *options: str) -> str:
    """Submit a script from a run's directory; return the job's id. Raises ConfigError if SLURM refuses it.

    The submitter's SBATCH_ variables do not override what the script sets.
    """
    ours = {f"SBATCH_{name.replace('-', '_').upper()}" for name in _options_in(script)} | _OTHER_VARIABLES
    env = {name: value for name, value in os.environ.items() if name not in ours}
    try:
        answer = run_command("sbatch", "--parsable", *options, str(script), cwd=run_dir, env=env)
    except SlurmError as err:
        raise ConfigError(f"SLURM does not take the job: {err}") from err
    return answer.strip().partition(";")[0]


def _options_in(script: Path) -> list[str]:
    """Return the names of the options that a script's #SBATCH lines set."""
    return re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)


def requeue(job_id: str, excluded: Sequence[str] = ()) -> str:
    """Put this job back into the queue, away from the excluded nodes. SLURM then ends the job's processes.

    Returns a warning if the nodes could not be excluded, else nothing. Raises SlurmError if the job was not
    requeued.
    """
    try:
        _retry("scontrol", "requeue", job_id)
    except SlurmError as err:
        way_out = "submit again, with --chain if the site requeues no jobs"
        raise SlurmError(f"not requeued: {err}; {way_out}") from err
    if not excluded:
        return ""
    # Nodes can be excluded only while a job waits. A requeued job waits for two minutes (cred_expire). It
    # is not held meanwhile: if this process were ended in between, it would stay held.
    try:
        names = ",".join([*_excluded_nodes(job_id), *excluded])
        run_command("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}")
    except SlurmError as err:
        return f"requeued, but not away from {', '.join(excluded)}: {err}"
    return ""


def _retry(*command: str) -> None:
    """Run a command, again for a while if SLURM does not answer, but not if it refuses. Raises SlurmError."""
    for _ in range(N_TRIES - 1):
        try:
            run_command(*command)
            return
        except SlurmError as err:
            if "disabled" in str(err) or "Invalid" in str(err):
                raise
        time.sleep(BETWEEN_TRIES_S)
    run_command(*command)


def _excluded_nodes(job_id: str) -> tuple[str, ...]:
    """Return the nodes that are already excluded for a job."""
    shown = run_command("scontrol", "--oneliner", "show", "job", job_id)
    match = re.search(r"\bExcNodeList=(\S+)", shown)
    return () if match is None or match[1] == "(null)" else hostnames(match[1])


# ---- start processes on the nodes ----


def srun_command(
    nodes: Sequence[str],
    module: str,
    arguments: Sequence[str],
    *,
    log: str | None,
    options: Mapping[str, str],
    kills_on_failure: bool = True,
) -> list[str]:
    """Return the srun command that runs `python -m module` once on each node.

    log                files LOG-NODE.log in the working directory; None: the job's own output
    kills_on_failure   a task that fails ends the others
    Once any task has ended, the others have a minute.
    """
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        # Both options: srun ignores tasks per node where sbatch has set a number of tasks.
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(nodes)}",
        "--unbuffered",
        "--mpi=none",
        f"--kill-on-bad-exit={int(kills_on_failure)}",
        "--wait=60",
        f"--job-name={module.rpartition('.')[2]}",
    ]
    if log is not None:
        command.append(f"--output={log}-%N.log")
    command += [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
    return [*command, sys.executable, "-m", module, *arguments]
