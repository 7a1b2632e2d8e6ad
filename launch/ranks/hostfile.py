"""`turnout train --hostfile`: train on several machines without a scheduler.

DeepSpeed's own runner starts the ranks there, by pdsh and ssh.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from turnout.launch.devices import count_gpus
from turnout.launch.ranks.launcher import (
    RanksOutcome,
    free_port,
    interruptible,
    kill_session,
    rank_environment,
    watch,
)
from turnout.training.errors import ConfigError
from turnout.training.run_control import FencingToken

ENVIRONMENT_FILE = "environment"  # in the attempt's directory; read by DeepSpeed's runner
# How long the runner, once interrupted, has to end the ranks on the other machines by pdsh.
END_REMOTE_S = 20
# DeepSpeed does not quote the ranks' command line for the two shells through which it passes.
UNQUOTED = re.compile(r"[\w@%+=:,./-]+")


@dataclass(frozen=True)
class Hosts:
    """The machines of a hostfile, each with the same number of slots."""

    path: Path
    names: tuple[str, ...]
    slots: int


def read_hosts(path: Path) -> Hosts:
    """Read a hostfile of lines `NAME slots=N`. Raises ConfigError naming the line."""
    slots: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--hostfile {path}: cannot be read: {err}; check the path") from err
    for n, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"([A-Za-z0-9_][\w.-]*)\s+slots=([1-9][0-9]*)", words)
        if match is None or match[1] in slots:
            fault = "names a host twice" if match else "is not NAME slots=N"
            raise ConfigError(f"--hostfile {path}: line {n} {words!r} {fault}; write it as node1 slots=8")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"--hostfile {path}: names no host; write one a line, as node1 slots=8")
    if len(set(slots.values())) > 1:
        raise ConfigError(
            f"--hostfile {path}: slots differ ({', '.join(f'{h} {n}' for h, n in slots.items())}); "
            "give each host the same number of slots"
        )
    return Hosts(path, tuple(slots), next(iter(slots.values())))


def check_hosts(hosts: Hosts, run_dir: Path) -> None:
    """Raise ConfigError if the hosts cannot be reached from here: a path needs quotes, or pdsh is missing."""
    for path in (run_dir.resolve(), hosts.path.resolve(), sys.executable, Path.cwd()):
        if not UNQUOTED.fullmatch(str(path)):
            raise ConfigError(
                f"--hostfile: {str(path)!r} passes through the shells of other machines; use a path of "
                "letters, digits and ./-_"
            )
    if shutil.which("pdsh") is None:
        raise ConfigError(
            "--hostfile needs pdsh to reach the machines, and it is not installed; install it (Debian: apt "
            "install pdsh), or use turnout submit"
        )


def launch_on_hosts(
    run_dir: Path, attempt_dir: Path, hosts: Hosts, *, fencing_token: FencingToken
) -> RanksOutcome:
    """Run the ranks on all hosts until they have ended. The paths must be the same on all of them."""
    environment = attempt_dir.resolve() / ENVIRONMENT_FILE
    settings = rank_environment(hosts.slots, has_gpus=count_gpus() > 0)
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    environment.write_text("".join(lines), encoding="utf-8")
    with interruptible(attempt_dir, fencing_token):
        launcher = subprocess.Popen(
            runner_command(run_dir, attempt_dir, hosts),
            env={**os.environ, "DS_ENV_FILE": str(environment)},
            start_new_session=True,
        )
        # range(0): DeepSpeed's launchers watch the ranks, also those on this machine.
        return watch(launcher, attempt_dir, range(0), fencing_token, end_remote)


def runner_command(run_dir: Path, attempt_dir: Path, hosts: Hosts) -> list[str]:
    """Return the command line of DeepSpeed's runner."""
    paths = [str(path.resolve()) for path in (run_dir, attempt_dir)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--hostfile={hosts.path.resolve()}",
        "--force_multi",
        f"--master_addr={hosts.names[0]}",
        f"--master_port={free_port()}",
        "--no_local_rank",
        "--module",
        "turnout.launch.ranks.worker",
        *paths,
    ]


def end_remote(launcher: int) -> None:
    """End the launcher and the ranks on all hosts."""
    deadline_s = time.monotonic() + END_REMOTE_S
    with suppress(ProcessLookupError):
        os.kill(launcher, signal.SIGINT)
        while time.monotonic() < deadline_s and not os.waitid(
            os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.2)
    kill_session(launcher)
