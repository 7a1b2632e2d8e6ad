"""A rank that dies or hangs: all ranks end, and the command reports which rank failed and where.

Real processes, hit at a moment that the victim's own flight recorder shows.
"""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.runs.test_train_command import RECIPE
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.training.parallel.flight_recorder import Entry, read_flight_record

# Limit for the last process to be gone, from the fault on; after a hang, from the end of the timeout on.
ALL_GONE_S = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults")
    make_corpus(directory, {"text": make_texts(100)}, valid_frac=0.05, shard_tokens=5000)
    (directory / "run.toml").write_text(RECIPE)
    return directory


class Run:
    """A run that would take hours, in the middle of its steps."""

    def __init__(self, place: Path, run_dir: str, nproc: int, *settings: str) -> None:
        command = [sys.executable, "-m", "turnout", "train", "run.toml", "--run-dir", run_dir]
        command += ["--nproc", str(nproc)]
        for setting in ("train.n_steps=1000000", "eval.every_steps=none", "parallel.ep=2", *settings):
            command += ["--set", setting]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.logs, self.nproc = place / run_dir / "logs" / "attempt-00001", nproc
        self._command = subprocess.Popen(
            command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline_s = time.monotonic() + 150
        while not all(self._has_stepped(rank) for rank in range(nproc)):
            if time.monotonic() > deadline_s or self._command.poll() is not None:
                self._command.terminate()
                raise AssertionError(f"the run did not reach its second step: {self._command.communicate()}")
            time.sleep(0.1)
        self.processes = psutil.Process(self._command.pid).children(recursive=True)

    def _has_stepped(self, rank: int) -> bool:
        path = self.logs / f"rank-{rank:05d}.flight"
        return path.exists() and self.last_entry(rank).step >= 2

    def last_entry(self, rank: int) -> Entry:
        entry = read_flight_record(self.logs / f"rank-{rank:05d}.flight").current
        assert entry is not None
        return entry

    def freeze(self, rank: int, phase: str | None = None) -> tuple[psutil.Process, Entry]:
        """Suspend a rank in this phase; return it with its last entry."""
        (victim,) = [p for p in self.processes if p.environ().get("RANK") == str(rank)]
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            victim.suspend()
            while victim.status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)
            entry = self.last_entry(rank)
            if phase in (None, entry.phase):
                return victim, entry
            victim.resume()
            time.sleep(random.uniform(0.001, 0.05))
        raise AssertionError(f"rank {rank} was never seen in {phase}")

    def end(self, timeout_s: float) -> list[str]:
        """Wait until the command and all its processes are gone; return the reasons it printed on stderr."""
        deadline_s = time.monotonic() + timeout_s
        try:
            _, stderr = self._command.communicate(timeout=timeout_s)
            _, alive = psutil.wait_procs(self.processes, timeout=max(0, deadline_s - time.monotonic()))
            assert not alive
        finally:
            for process in self.processes:
                if process.is_running():
                    process.kill()
        assert self._command.returncode == 1 and "Traceback" not in stderr, stderr
        lines = stderr.splitlines()
        assert all(line.startswith("turnout: ") for line in lines), stderr
        assert lines[-1].startswith("turnout: the run ended early, exit code 1")
        return [line.removeprefix("turnout: ") for line in lines[:-1]]


def check_report(lines: list[str], fate: str, victim: int, entry: Entry, nproc: int) -> None:
    """Check that the first line names the victim and where it was, and the others each peer once."""
    print("\n".join(lines))
    assert lines[0].startswith(f"rank {victim} {fate}; last seen in step {entry.step}, {entry.phase}"), lines
    if entry.operation is not None:
        assert f"{'waiting in' if entry.is_waiting else 'after'} " in lines[0]
        assert f"{entry.operation} (" in lines[0]
    peers: list[int] = []
    for line in lines[1:]:
        match = re.match(
            r"ranks? ([\d, ]+) (waited for it in|waited in|lost contact in|got to) step \d+, ", line
        )
        assert match, line
        peers += [int(rank) for rank in match[1].split(", ")]
    assert sorted(peers) == [rank for rank in range(nproc) if rank != victim]


@pytest.mark.parametrize(
    ("phase", "victim", "nproc"),
    [
        ("forward", 1, 4),
        pytest.param("backward", 0, 2, marks=pytest.mark.long),
        pytest.param("optimizer step", 1, 2, marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_is_named_with_step_and_phase(phase: str, victim: int, nproc: int, place: Path) -> None:
    run = Run(place, phase.replace(" ", "-"), nproc)
    process, entry = run.freeze(victim, phase)
    process.kill()
    lines = run.end(ALL_GONE_S)
    check_report(lines, "died without an error message (killed, or out of memory)", victim, entry, nproc)


def test_a_stopped_rank_is_named_once_the_others_have_waited_long_enough(place: Path) -> None:
    run = Run(place, "stopped", 4, "parallel.timeout_s=10")
    start_s = time.monotonic()
    _, entry = run.freeze(2, "forward")
    lines = run.end(10 + ALL_GONE_S)
    assert time.monotonic() - start_s > 9, "the others had not yet waited for timeout_s"
    assert "parallel.timeout_s had passed" in lines.pop()
    check_report(lines, "hung (stopped, or stuck in the system) and had to be killed", 2, entry, 4)
    assert any(" waited for it in " in line for line in lines)
    assert (run.logs / "rank-00002.stack").read_text() == ""
