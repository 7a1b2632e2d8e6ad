"""What is asked of SLURM's own commands, each bounded in time; nothing here decides anything."""

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
N_TRIES, BETWEEN_TRIES_S = 10, 30  # a controller that is being restarted is back in minutes
REACH_S = 3


class SlurmError(RuntimeError):
    """A command of SLURM is missing, failed or did not answer."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it. directory: in which it was submitted."""

    job_id: str
    state: str
    reason: str
    time_left: str
    nodes: str
    directory: str


def ask(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Return what a command prints. Raises SlurmError."""
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


def sbatch(script: Path, run_dir: Path, *options: str) -> str:
    """Submit a script from a run's directory, and return the job's id. Raises ConfigError if refused.

    What the script sets is not changed by the submitter's SBATCH_ variables.
    """
    ours = {f"SBATCH_{name.replace('-', '_').upper()}" for name in directives(script)} | _OTHER_NAMES
    env = {name: value for name, value in os.environ.items() if name not in ours}
    try:
        answer = ask("sbatch", "--parsable", *options, str(script), cwd=run_dir, env=env)
    except SlurmError as err:
        raise ConfigError(f"SLURM does not take the job: {err}") from err
    return answer.strip().partition(";")[0]


# Variables that are not named after their option, and those that make another thing of a job.
_OTHER_NAMES = {"SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU"}
_OTHER_NAMES |= {"SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_TEST_ONLY", "SBATCH_IGNORE_PBS"}


def directives(script: Path) -> list[str]:
    return re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)


def hostnames(node_list: str) -> tuple[str, ...]:
    """Return the nodes that n[1-2] means."""
    return tuple(ask("scontrol", "show", "hostnames", node_list).split())


def queued_jobs(*options: str) -> list[QueuedJob]:
    """Return the jobs that wait or run, of those that squeue's options choose."""
    shown = ask("squeue", "--noheader", *options, "--format=%i %T|%r|%L|%N|%Z")
    # A stranger's directory may hold line breaks; what is left of such a name matches no run.
    found = re.findall(r"(?m)^(\S+) (\w+)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|(.*)$", shown)
    return [QueuedJob(*fields) for fields in found]


def jobs_of(run_dir: Path) -> list[QueuedJob]:
    """Return this user's jobs that train in a run directory, or wait to."""
    return [
        job for job in queued_jobs("--me") if os.path.realpath(job.directory) == os.path.realpath(run_dir)
    ]


def find_job(job_id: str) -> QueuedJob | None:
    """Return a job, or None where it has ended or was never there."""
    return next((job for job in queued_jobs("--me") if job.job_id == job_id), None)


def end_time_s(job_id: str) -> float | None:
    """Return when a job's time limit is reached, in Unix time; None where it has none."""
    with suppress(ValueError):
        return datetime.fromisoformat(
            ask("squeue", "--noheader", f"--jobs={job_id}", "--format=%e").strip()
        ).timestamp()
    return None


def requeue(job_id: str, excluded: Sequence[str] = ()) -> str:
    """Put this job back into the queue, away from some nodes. Its processes are then ended from outside.

    Return what went wrong although it is in the queue, or nothing. Raises SlurmError where it is not.
    """
    try:
        _insist("scontrol", "requeue", job_id)
    except SlurmError as err:
        way_out = "submit again, with --chain where the site requeues nothing"
        raise SlurmError(f"not requeued: {err}; {way_out}") from err
    if not excluded:
        return ""
    # Nodes can be excluded only while a job waits. It does so for two minutes (cred_expire); not held, or it
    # would stay so if this process were ended in between.
    try:
        names = ",".join([*_excluded_nodes(job_id), *excluded])
        ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}")
    except SlurmError as err:
        return f"requeued, but not away from {', '.join(excluded)}: {err}"
    return ""


def _insist(*command: str) -> None:
    """Ask again for a while where SLURM does not answer; not where it refuses. Raises SlurmError."""
    for _ in range(N_TRIES - 1):
        try:
            ask(*command)
            return
        except SlurmError as err:
            if "disabled" in str(err) or "Invalid" in str(err):
                raise
        time.sleep(BETWEEN_TRIES_S)
    ask(*command)


def _excluded_nodes(job_id: str) -> tuple[str, ...]:
    """Return the nodes that a job already keeps away from."""
    match = re.search(r"\bExcNodeList=(\S+)", ask("scontrol", "--oneliner", "show", "job", job_id))
    return () if match is None or match[1] == "(null)" else hostnames(match[1])


def unreachable_nodes(nodes: Sequence[str]) -> list[str]:
    """Return the nodes whose SLURM daemon does not answer. SLURM itself finds out minutes later."""
    return [node for node in nodes if not _is_reachable(node)]


def _is_reachable(node: str) -> bool:
    shown = ask("scontrol", "--oneliner", "show", "node", node)
    address, port = re.search(r"\bNodeAddr=(\S+)", shown), re.search(r"\bPort=(\d+)", shown)
    default = re.search(r"SlurmdPort\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    number = port or default
    if address is None or number is None:
        return True  # nothing is known against it
    try:
        socket.create_connection((address[1], int(number[1])), timeout=REACH_S).close()
    except OSError:
        return False
    return True


def srun_command(
    nodes: Sequence[str],
    module: str,
    arguments: Sequence[str],
    *,
    log: str | None,
    options: Mapping[str, str],
    kills_on_failure: bool = True,
) -> list[str]:
    """Return the command; it runs in the directory of its logs.

    log: files LOG-NODE.log, or None for the job's own output. kills_on_failure: a task that fails ends the
    others. The first that ends at all gives the others a minute.
    """
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        # Both: a number of tasks for each node is ignored where sbatch has set a number of tasks.
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
