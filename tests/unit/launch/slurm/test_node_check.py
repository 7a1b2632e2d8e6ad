"""The checks that a node must pass, each run on this machine; tests/slurm has nodes that differ."""

import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from turnout.launch.slurm.node_check import (
    CHECKS,
    Problem,
    code_problems,
    connection_problems,
    corpus_problems,
    disk_problems,
    lock_problems,
)
from turnout.launch.slurm.node_report import judge, read_answer
from turnout.launch.slurm.submission import Submission, read_submission, snapshot, write_submission


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a submission's directory, as `turnout submit` leaves it."""
    directory = tmp_path_factory.mktemp("submit")
    limits = {"warn_s": 60, "max_failures": 3, "n_bytes": 1, "allowed_changes": (), "srun_options": {}}
    kind = {"ranks_per_node": 1, "has_gpus": False, "is_chain": False, "is_preflight": False}
    versions = snapshot(directory, '[data]\ncorpus = "nowhere"\n')
    write_submission(directory, Submission(**limits, **kind, **versions))  # type: ignore[arg-type]
    return directory


def messages(problems: Iterable[Problem]) -> list[str]:
    return [problem.message for problem in problems]


def test_a_node_as_it_was_submitted_has_no_problem(directory: Path) -> None:
    wanted = read_submission(directory)
    assert not list(code_problems(directory, wanted)) and not list(disk_problems(directory, wanted))
    assert (directory / "code" / "turnout" / "slurm" / "job.sh").exists()
    assert (directory / "code" / "turnout" / "launch" / "recipes" / "tiny.toml").exists()


def test_other_versions_are_reported_by_name(directory: Path) -> None:
    wanted = read_submission(directory)
    other = replace(wanted, python="3.9.1", packages={**wanted.packages, "torch": "1.0"})
    python, torch = messages(code_problems(directory, other))
    assert python.startswith("has Python 3.") and python.endswith(", not 3.9.1")
    assert torch.startswith("has torch 2.") and torch.endswith(", not 1.0")


def test_a_corpus_that_a_node_cannot_read_is_reported(directory: Path) -> None:
    assert messages(corpus_problems(directory)) == [
        "cannot read the corpus: nowhere/corpus.json: No such file or directory"
    ]


@pytest.mark.parametrize("file", ["code/turnout/training/loop.py", "recipe.toml"])
def test_an_edit_since_the_submission_is_found(file: str, directory: Path) -> None:
    wanted, path = read_submission(directory), directory / file
    before = path.read_bytes()
    path.write_bytes(before + b"# edited\n")
    try:
        (problem,) = messages(code_problems(directory, wanted))
    finally:
        path.write_bytes(before)
    assert problem.endswith(f"{file.split('/')[0]} is not as it was when the job was submitted")


def test_a_disk_without_room_for_a_checkpoint_is_no_nodes_fault(directory: Path) -> None:
    (problem,) = disk_problems(directory, replace(read_submission(directory), n_bytes=2**60))
    assert problem.scope == "all" and "GiB free, and a checkpoint takes 1073741824.00" in problem.message


def test_a_port_on_which_nobody_listens_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not list(connection_problems("127.0.0.1", port))
    (problem,) = messages(connection_problems("127.0.0.1", port))
    assert problem.startswith(f"cannot reach 127.0.0.1, port {port}, where the ranks meet")


def test_the_lock_of_a_killed_build_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert not list(lock_problems()), "a build may still be running"
    os.utime(lock, times=(time.time() - 7200,) * 2)
    assert messages(lock_problems()) == [f"{lock} is 2.0 h old: a build was killed; remove it"]


def test_a_wrong_clock_and_a_silent_node_are_reported(tmp_path: Path) -> None:
    (tmp_path / CHECKS).mkdir()
    (tmp_path / CHECKS / "n1.json").write_text(json.dumps({"time_s": 1060.0, "problems": []}))
    assert read_answer(tmp_path, "n1", 1055.0, 1061.0) == []
    (problem,) = read_answer(tmp_path, "n1", 1090.0, 1091.0)
    assert problem.scope == "node" and problem.message.startswith("its clock is off by 30 s")
    (tmp_path / "check-n2.log").write_text("one\nNo space left on device\n")
    (problem,) = read_answer(tmp_path, "n2", 0.0, 1.0)
    assert problem.message.startswith("did not answer") and problem.message.endswith(
        "No space left on device"
    )


def test_a_node_is_blamed_only_if_another_would_do_better() -> None:
    bad, full = Problem("node", "has torch 1.0"), Problem("all", "no room")
    assert judge({"n1": [], "n2": []}) == ([], [])
    assert judge({"n1": [], "n2": [bad]}) == (["n2"], ["node n2: has torch 1.0"])
    assert judge({"n1": [full], "n2": [full]}) == ([], ["node n1, n2: no room"])
    assert judge({"n1": [bad], "n2": [bad]})[0] == [], "no other node would do better"
    assert judge({"n1": [bad]})[0] == ["n1"], "another node might do better"
    assert judge({"n1": [bad, full]})[0] == [], "no other node has room"
