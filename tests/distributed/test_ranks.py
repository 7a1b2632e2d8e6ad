"""The ranks of these tests go when nobody asks them any more."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long  # of the tests themselves
CALL = """
from tests.bench.side_by_side import in_own_process
from tests.distributed.test_ranks import sizes_of_ranks
if __name__ == "__main__":
    print(in_own_process(sizes_of_ranks, malloc={}))
"""
KEEP = """
import time
from tests.distributed.test_ranks import sizes_of_ranks
if __name__ == "__main__":
    print(sizes_of_ranks(), flush=True)
    time.sleep(300)
"""


def sizes_of_ranks() -> list[int]:
    return run_ranks(world_size, 2)


def world_size(rank: int) -> int:
    return dist.get_world_size()


def test_a_process_that_had_ranks_ends() -> None:
    run = subprocess.run([sys.executable, "-c", CALL], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stdout) == (0, "[2, 2]\n"), run.stderr


def test_ranks_of_a_killed_process_end_though_they_are_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", KEEP], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None and run.stdout.readline() == "[2, 2]\n"
            children = psutil.Process(run.pid).children(recursive=True)
            wait_until(lambda: len(stopped(children)) == 2)
        finally:
            run.kill()
    wait_until(lambda: not any(is_there(process) for process in children))


def stopped(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.status() == psutil.STATUS_STOPPED]


def is_there(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
