"""`turnout train --hostfile` with DeepSpeed's own runner: pdsh, a real sshd on each node, no scheduler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.runs.recovery import stored_tensors
from tests.runs import read_rows
from tests.slurm.lab import WAIT_S, JobRun, Lab, wait_for

NODES = ("n1", "n2")
SHORT = ["--set", "train.n_steps=30"]
TURNOUT = ("python", "-m", "turnout")  # by a path without a blank


@pytest.fixture(scope="module")
def ssh(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start sshd on the nodes; return the environment in which they reach each other without a password."""
    place = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires it
    options = {
        "HostKey": place / "host",
        "AuthorizedKeysFile": place / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
        "Port": "2222",
    }
    (place / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    client = ["-i", str(place / "user"), "-p", "2222", "-o", "StrictHostKeyChecking=no"]
    client += ["-o", f"UserKnownHostsFile={place / 'known'}", "-o", "LogLevel=ERROR"]
    # DeepSpeed calls plain ssh.
    wrapper = place / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {" ".join(client)} "$@"\n')
    wrapper.chmod(0o755)
    servers = []
    for node in NODES:
        pid = (lab.directory / "pid" / f"init.{node}").read_text().strip()
        enter = ["nsenter", "-t", pid, "-m", "-n", "-u", "-p"]
        servers.append(subprocess.Popen([*enter, "/usr/sbin/sshd", "-D", "-f", str(place / "sshd_config")]))
    # Python's path passes through the shells of the nodes, so it may hold no blank.
    (place / "env").symlink_to(sys.prefix)
    path = f"{wrapper.parent}:{place / 'env' / 'bin'}:{os.environ['PATH']}"
    yield {**lab.env, "PATH": path, "OMP_NUM_THREADS": "1"}
    for server in servers:
        server.terminate()
        server.wait(10)


def start_on_first_node(lab: Lab, env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    pid = (lab.directory / "pid" / "init.n1").read_text().strip()
    enter = ["nsenter", "-t", pid, "-m", "-n", "-u", "-p", "env", f"--chdir={lab.place}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*enter, *command], env=env, text=True, **pipes)  # type: ignore[call-overload]


def wait_for_ssh(lab: Lab, env: dict[str, str]) -> None:
    def answers() -> bool:
        trial = start_on_first_node(lab, env, "ssh", "n2", "true")
        trial.communicate(timeout=WAIT_S)
        return trial.returncode == 0

    wait_for(answers, "sshd on n2")


def test_two_machines_train_with_a_hostfile(lab: Lab, ssh: dict[str, str]) -> None:
    (lab.place / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    wait_for_ssh(lab, ssh)
    train = ["train", "run.toml", *SHORT]
    command = start_on_first_node(lab, ssh, *TURNOUT, *train, "--run-dir", "hosts-run", "--hostfile", "hosts")
    said = command.communicate(timeout=WAIT_S)
    assert command.returncode == 0, said
    lab.turnout(*train, "--run-dir", "one-machine", "--nproc", "2")
    got, want = (
        stored_tensors(lab.place / name / "checkpoints" / "step-00000030")
        for name in ("hosts-run", "one-machine")
    )
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert [row["step"] for row in read_rows(lab.place / "hosts-run")] == list(range(1, 31))


@pytest.mark.long
def test_a_failure_on_hosts_is_reported_and_leaves_no_rank(lab: Lab, ssh: dict[str, str]) -> None:
    """A file stands where the checkpoints' directory belongs, so the first save fails."""
    (lab.place / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    wait_for_ssh(lab, ssh)
    run_dir = lab.place / "hosts-fail"
    train = ["train", "run.toml", *SHORT, "--run-dir", run_dir.name, "--hostfile", "hosts"]
    command = start_on_first_node(lab, ssh, *TURNOUT, *train)
    wait_for((run_dir / "logs" / "attempt-00001").exists, "the attempt")
    (run_dir / "checkpoints").touch()
    _, stderr = command.communicate(timeout=WAIT_S)
    assert command.returncode == 1, stderr
    assert "step 10 could not be saved" in stderr and "Traceback" not in stderr, stderr
    assert not JobRun(lab, run_dir, []).processes(1)
