"""What killed or ended processes leave behind: a flight record, a stack, an unfinished export."""

import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turnout.launch.commands.export import LOCK, publish
from turnout.launch.ranks.attempt_dir import END_SIGNAL, make_attempt_dir
from turnout.training.parallel.flight_recorder import read_flight_record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attempt_dir(tmp_path: Path) -> Path:
    return make_attempt_dir(tmp_path / "logs")


def test_the_flight_record_of_a_killed_process_shows_where_it_was(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from turnout.training.parallel.flight_recorder import FlightRecorder
from turnout.training.parallel.layout import Layout
recorder = FlightRecorder(Path({str(tmp_path / "a.flight")!r}), Layout(2), 1)
recorder.enter_phase(7, "optimizer step")
with recorder.collective("all-reduce", "dp"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    entry = read_flight_record(tmp_path / "a.flight").current
    assert entry is not None and entry.is_waiting
    assert (entry.step, entry.phase, entry.operation) == (7, "optimizer step", "all-reduce")


@pytest.mark.parametrize("library", ["CDLL", "PyDLL"], ids=["in C++", "in C++ that holds the GIL"])
def test_a_rank_that_is_sent_the_end_signal_writes_its_stack_and_ends(
    library: str, attempt_dir: Path
) -> None:
    code = f"""
import ctypes
from turnout.launch.ranks.failures import write_stack_at_end
write_stack_at_end(file := open({str(attempt_dir / "stack")!r}, "w"))
def stuck():
    print("there", flush=True)
    ctypes.{library}(None).sleep(100)
stuck()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        time.sleep(0.2)
        process.send_signal(END_SIGNAL)
        assert process.wait(20) == -END_SIGNAL
    assert "in stuck" in (attempt_dir / "stack").read_text()


KILLED = """
import os, pathlib, sys
from turnout.launch.commands.export import publish

with publish(pathlib.Path(sys.argv[1])) as directory:
    (directory / "half").touch()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_export_left_is_swept(tmp_path: Path) -> None:
    """But nothing else with such a name: a user's directory, or an export that is still being written."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name.rpartition(".tmp")[2] for path in tmp_path.iterdir()}
    assert left == {"", LOCK}
    for name in ("out.mine.tmp", "elsewhere", "out.busy.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "out.link.tmp").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"out.link.tmp{LOCK}").touch()
    with (tmp_path / f"out.busy.tmp{LOCK}").open("x") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with publish(tmp_path / "out") as directory:
            (directory / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    kept = {"elsewhere", "out", "out.busy.tmp", f"out.busy.tmp{LOCK}", "out.link.tmp", "out.mine.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert all(list((tmp_path / name).iterdir()) for name in ("elsewhere", "out.busy.tmp", "out.mine.tmp"))
