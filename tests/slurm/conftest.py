"""One cluster for all tests of SLURM. If it cannot be started, they are skipped with the reason."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, reason_to_skip

NEEDED = "TURNOUT_TESTS_NEED_SLURM"  # in the environment: fail instead of skipping
# So small that a test can fill it. It is mounted before the nodes start, so they see it.
SMALL_DISK = "size=40m"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if (reason := reason_to_skip()) is not None:
        assert not os.environ.get(NEEDED), reason
        pytest.skip(reason)
    # Not below pytest's directory, whose path is too long for a socket.
    directory = Path(f"/tmp/slurm-{tmp_path_factory.getbasetemp().name}-{id(tmp_path_factory)}")
    lab = Lab(directory, tmp_path_factory.mktemp("cluster"))
    lab.make_place()
    small = lab.place / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", SMALL_DISK, "tmpfs", str(small)], check=True)
    try:
        lab.script("up")
        yield lab
    finally:
        lab.script("down")
        subprocess.run(["umount", str(small)], check=True)


@pytest.fixture(autouse=True)
def _usable(lab: Lab) -> Iterator[None]:
    """Begin each test with all nodes idle; if they do not become idle, fail it and restart the cluster."""
    try:
        lab.wait_until_usable()
    except AssertionError:
        lab.restart()
        raise
    yield
    lab.run("scancel", "--user=root")
