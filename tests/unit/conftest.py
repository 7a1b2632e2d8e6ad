"""Fixtures of more than one test file."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import save_alone
from tests.ranks import join_alone
from tests.unit.hostile_fixtures import limits
from training.checkpoint_dir import verify_checkpoint


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process as the only rank: its process group, and what DeepSpeed's launcher sets for a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("DS_ACCELERATOR", "cpu")
        join_alone()
        yield


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint, of step 7."""
    (path,) = save_alone(tmp_path_factory.mktemp("honest") / "run", [7])
    verify_checkpoint(path)  # so that all is imported that the limits are not to count
    return path


@pytest.fixture
def path(honest: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint to be spoiled, in a process of little memory and time."""
    with limits():
        yield Path(shutil.copytree(honest, tmp_path / honest.name))
