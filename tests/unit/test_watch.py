"""What the command does about ranks that are waited for no more; a process that sleeps is in their place."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.failures import record_failure
from launch.local import kill_session, watch
from launch.start_dir import make_start_dir
from training.errors import TakenOverError
from training.owner import Owner, take_over


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as process:
        yield process
        kill_session(process.pid)


def test_ranks_of_a_start_that_was_overtaken_are_ended(
    launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    start_dir = make_start_dir(tmp_path / "logs")
    owner = Owner(tmp_path, take_over(tmp_path))
    take_over(tmp_path)
    with pytest.raises(TakenOverError, match="another start of this run has taken over"):
        watch(launcher, start_dir, range(2), owner, kill_session)
    assert launcher.returncode is not None


def test_a_failure_on_another_node_ends_the_ranks_of_this_one(
    launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    start_dir = make_start_dir(tmp_path / "logs")
    record_failure(KeyError("there"), 7, start_dir)
    begun_s = time.monotonic()
    ended = watch(launcher, start_dir, range(2), None, kill_session)
    assert not ended.is_done and launcher.returncode is not None
    assert time.monotonic() - begun_s < 20
