"""The batch script of a job: a pure function of the request, and the checks of sbatch's and srun's options.

Whatever reaches the shell from the user is quoted by shlex. Values that SLURM reads itself (#SBATCH lines)
may hold no character that would need quotes.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from turnout.training.errors import ConfigError, printable

TEMPLATES = resources.files("turnout.slurm")
SCRIPT_FILE, ENV_FILE = "job.sh", "fabric.env"
# Where the job's own output goes, relative to the run directory, from which it is submitted.
OUTPUT = "logs/slurm-%j.out"

_OPTION = re.compile(r"[a-z][a-z-]*")
_VALUE = re.compile(r"[A-Za-z0-9_.,:=@/+*&|!()\[\]~-]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class JobRequest:
    """What a job asks of SLURM.

    nodes           "8", or "4-8" for as many as are free
    warn_s          how long before the time limit SLURM warns the job
    gpus_per_node   None on CPUs
    options         further options of sbatch, by name; they override turnout's
    """

    run_dir: Path
    submission: Path
    python: Path
    nodes: str
    time: str
    warn_s: int
    gpus_per_node: int | None = None
    is_shared: bool = False
    is_requeued: bool = True
    options: Mapping[str, str] | None = None


def job_script(request: JobRequest) -> str:
    """Return the batch script. Raises ConfigError if it cannot hold a value."""
    lines = ["#!/bin/bash"]
    for name, value in directives(request).items():
        lines.append(f"#SBATCH --{name}" + (f"={value}" if value else ""))
    variables = {
        "run_dir": request.run_dir,
        "submission": request.submission,
        "python": request.python,
    }
    lines += ["", *(f"{name}={shlex.quote(str(value))}" for name, value in variables.items()), ""]
    return "\n".join(lines) + (TEMPLATES / SCRIPT_FILE).read_text(encoding="utf-8")


def directives(request: JobRequest) -> dict[str, str]:
    """Return the options of sbatch; one with an empty value is a switch.

    Raises ConfigError if the warning does not come within the time limit, or if an option is not the user's
    to set.
    """
    node_range(request.nodes)
    limit_s = time_limit_s(request.time)
    if not 0 < request.warn_s < limit_s:
        raise ConfigError(
            f"--warn-s {request.warn_s} must be above 0 and below the {limit_s} s of --time {request.time}; "
            "raise --time, or lower --warn-s"
        )
    chosen = {
        "job-name": job_name(request.run_dir),
        "nodes": request.nodes,
        "time": request.time,
        "signal": f"B:USR1@{request.warn_s}",
        "open-mode": "append",
        "output": OUTPUT,
        "requeue" if request.is_requeued else "no-requeue": "",
    }
    if request.gpus_per_node is not None:
        chosen["gpus-per-node"] = str(request.gpus_per_node)
    if not request.is_shared:
        chosen["exclusive"] = ""
        if not any(name.startswith("mem") for name in request.options or {}):
            chosen["mem"] = "0"
    for name, value in (request.options or {}).items():
        check_option(name, value)
        if name in _OURS:
            raise ConfigError(f"--sbatch {name}={value}: turnout sets {name} itself; {_OURS[name]}")
        chosen[name] = value
    return chosen


def node_range(text: str) -> tuple[int, int]:
    """Return the fewest and the most nodes of N or MIN-MAX. Raises ConfigError if the text is neither."""
    lowest, _, highest = text.partition("-")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", text) or int(highest or lowest) < int(lowest):
        raise ConfigError(f"--nodes {text!r} is neither a number nor MIN-MAX; use 8, or 4-8")
    return int(lowest), int(highest or lowest)


_OURS = {
    "nodes": "use --nodes",
    "time": "use --time",
    "gpus-per-node": "use --gpus-per-node",
    "signal": "use --warn-s",
    # Either would also make SLURM give the fewest nodes of MIN-MAX.
    "ntasks-per-node": "one task per node starts the node's ranks",
    "ntasks": "one task per node starts the node's ranks",
    "requeue": "use --chain where jobs cannot be requeued",
    "no-requeue": "use --chain where jobs cannot be requeued",
    "open-mode": "a requeued job must not overwrite its log",
    "output": "the log is logs/slurm-JOB.out in the run directory",
    "error": "the log is logs/slurm-JOB.out in the run directory",
    "chdir": "jobs run in their run directory",
    "array": "a run is one job",
    "wrap": "the script is turnout's own",
    "test-only": "use --dry-run",
    "wait": "use turnout status",
}


def check_option(name: str, value: str) -> None:
    """Check an option of sbatch or srun. Raises ConfigError if its name or value would need quotes."""
    if not _OPTION.fullmatch(name):
        raise ConfigError(
            f"SLURM option {printable(name)!r} is not a long option's name; use partition=gpu for example"
        )
    if value and not _VALUE.fullmatch(value):
        raise ConfigError(
            f"SLURM option {name}: {printable(value)!r} has a character that a batch script cannot hold; "
            "use letters, digits and _.,:=@/+*&|!()[]~-"
        )


def parse_options(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Parse NAME=VALUE texts; a NAME alone is a switch. Raises ConfigError for a bad or repeated option."""
    options = {}
    for text in texts:
        name, _, value = text.removeprefix("--").partition("=")
        check_option(name, value)
        if name in options:
            raise ConfigError(f"{flag} names {name} twice; leave one out")
        options[name] = value
    return options


# Options of srun that decide how the one task of each node starts and where it writes.
SRUN_OURS = {
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "nodelist",
    "output",
    "error",
    "chdir",
    "kill-on-bad-exit",
    "wait",
    "mpi",
}


def parse_srun_options(texts: Sequence[str]) -> dict[str, str]:
    """Return the options of the ranks' srun. Raises ConfigError for one that turnout sets itself."""
    options = parse_options("--srun", texts)
    if taken := sorted(SRUN_OURS & options.keys()):
        raise ConfigError(f"--srun {taken[0]}: turnout sets {taken[0]} itself; leave it out")
    return options


def job_name(run_dir: Path) -> str:
    """Return a job name: that of the run directory, with _ for each character that would need quotes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name).lstrip("-.") or "turnout"


def time_limit_s(text: str) -> int:
    """Return the seconds of a time limit in sbatch's formats: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises ConfigError if the text has none of them.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--time {printable(text)!r} is no time limit; use 24:00:00, or 2-00:00:00 for two days"
        )
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        parts = (parts + [0, 0])[:3]
    elif len(parts) < 3:
        parts = [0, *parts, *([0] if len(parts) == 1 else [])]
    hours, minutes, seconds = parts
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
