"""When the command stops waiting for its ranks and ends them; a sleeping process plays the launcher."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.failures import record_failure
from turnout.launch.ranks.launcher import RanksOutcome, kill_session, watch
from turnout.training.errors import TakenOverError
from turnout.training.parallel.flight_recorder import ENDED
from turnout.training.run_control import FencingToken, take_over

ROOT = Path(__file__).parents[2]
A_RANK = """
import sys
from pathlib import Path
from turnout.training.parallel.layout import Layout
from turnout.training.parallel.flight_recorder import FlightRecorder
attempt_dir, rank, phase = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", Layout(3), rank).enter_phase(7, phase)
"""


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as process:
        yield process
        kill_session(process.pid)


def test_the_ranks_of_an_overtaken_attempt_are_ended(
    launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    attempt_dir = make_attempt_dir(tmp_path / "logs")
    fencing_token = FencingToken(tmp_path, take_over(tmp_path))
    take_over(tmp_path)
    with pytest.raises(TakenOverError, match="another attempt of this run has taken over"):
        watch(launcher, attempt_dir, range(2), fencing_token, kill_session)
    assert launcher.returncode  # it was killed


def test_a_failure_on_another_node_ends_the_ranks_of_this_one(
    launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    attempt_dir = make_attempt_dir(tmp_path / "logs")
    record_failure(KeyError("there"), 7, attempt_dir)
    began_s = time.monotonic()
    outcome = watch(launcher, attempt_dir, range(2), None, kill_session)
    assert not outcome.is_done and launcher.returncode is not None
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize(("n_ranks", "n_ended", "is_done"), [(2, 2, True), (2, 1, False), (3, 2, False)])
def test_a_run_has_ended_when_all_its_ranks_have_even_if_its_launcher_has_not(
    n_ranks: int, n_ended: int, is_done: bool, launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Two ranks have begun, and both are gone."""
    attempt_dir = make_attempt_dir(tmp_path / "logs")
    for rank in range(2):
        phase = ENDED if rank < n_ended else "forward"
        subprocess.run([sys.executable, "-c", A_RANK, attempt_dir, str(rank), phase], cwd=ROOT, check=True)
    if not is_done:
        threading.Timer(3, launcher.terminate).start()
    assert watch(launcher, attempt_dir, range(n_ranks), None, kill_session) == RanksOutcome(is_done, set())
    assert launcher.returncode  # it was killed
