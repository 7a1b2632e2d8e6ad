"""Fixtures that several test files share, and the rule that no test here starts a process."""

import multiprocessing.process
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import save_alone
from tests.ranks import join_alone
from tests.unit.hostile_fixtures import limits
from turnout.training.checkpoint.directory import verify_checkpoint

# The audit events of a process that is about to start; multiprocessing raises none for its own.
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
_forbids_processes = False


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if _forbids_processes and event in STARTS:
        raise RuntimeError(
            f"{event} {arguments[:2]}: a test that starts a process belongs in tests/processes"
        )


sys.addaudithook(_refuse_processes)  # Python has no way to remove it


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global _forbids_processes

    def refuse(process: multiprocessing.process.BaseProcess) -> None:
        _refuse_processes("subprocess.Popen", (process.name,))

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    _forbids_processes = True
    yield
    _forbids_processes = False


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process as the only rank: it has a process group, and the variables of DeepSpeed's launcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("DS_ACCELERATOR", "cpu")
        join_alone()
        yield


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint, at step 7."""
    (path,) = save_alone(tmp_path_factory.mktemp("honest") / "run", [7])
    verify_checkpoint(path)  # imports everything now, so that limits() does not count it
    return path


@pytest.fixture
def path(honest: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkpoint to damage, while the process is limited in memory and time."""
    with limits():
        yield Path(shutil.copytree(honest, tmp_path / honest.name))
