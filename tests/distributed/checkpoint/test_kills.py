"""Ranks that are killed at every boundary of a save: the next attempt finds the newest intact checkpoint.

Two ranks save step 3 of a run that has steps 1 and 2 and keeps two, so the save also removes one. Before
every mkdir, create, write, fsync, rename, removal and exchange between the ranks, a rank kills itself, alone
or with the other.
"""

import os
import re
import shutil
import signal
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch

from tests.checkpoints import SMALL_KINDS, SMALL_SHAPE, saver_of, small_rank_state, small_values, state_at
from tests.ranks import RankFailed, RankPool, join_alone
from tests.runs import run_config
from turnout.training.checkpoint.directory import (
    CHECKPOINTS,
    POINTER_FILE,
    list_checkpoints,
    verify_checkpoint,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.resharding import Shard
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.config.checkpoint import CheckpointConfig
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over

CFG = run_config().model_copy(update={"checkpoint": CheckpointConfig(every_steps=1, keep_last=2)})
N_RANKS = 2
Boundary = tuple[str, str]


@dataclass(frozen=True)
class Killer:
    """A rank, the number of the boundary at which it kills, and the processes that it kills, itself last."""

    rank: int
    fatal: int
    pids: tuple[int, ...]


class DeadlyDisk(Disk):
    """Records each boundary. The killer's disk kills at the fatal one."""

    def __init__(self, killer: Killer | None) -> None:
        self.passed: list[Boundary] = []
        self._killer = killer

    def boundary(self, name: str, path: Path) -> None:
        if self._killer is not None and len(self.passed) == self._killer.fatal:
            for pid in self._killer.pids:
                os.kill(pid, signal.SIGKILL)
        self.passed.append((name, path.name))


def save(rank: int, run_dir: Path, token: str, steps: list[int], killer: "Killer | None") -> list[Boundary]:
    """Save these steps, unless killed; return the boundaries that were passed."""
    groups = Groups(Layout(N_RANKS), rank, torch.device("cpu"), timeout_s=30)
    disk = DeadlyDisk(killer if killer is not None and killer.rank == rank else None)
    saver = saver_of(run_dir, groups, CFG, token=token, disk=disk)
    for step in steps:
        saver.save(small_rank_state(step, rank, N_RANKS), state_at(step))
    saver.close()
    return disk.passed


def pid(rank: int) -> int:
    return os.getpid()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    run_dir.mkdir()
    pool = RankPool(N_RANKS)
    pool.run(save, (run_dir, take_over(run_dir), [1, 2], None))
    pool.close()
    return run_dir


@pytest.fixture(scope="module")
def boundaries(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Boundary]]:
    """The boundaries that each rank passes while it saves step 3 and no rank dies."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(saved, run_dir)
    pool = RankPool(N_RANKS)
    passed = pool.run(save, (run_dir, take_over(run_dir), [3], None))
    pool.close()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000003", "step-00000002"]
    return passed


def test_a_save_passes_all_kinds_of_boundaries(boundaries: list[list[Boundary]]) -> None:
    first, second = ([kind for kind, _ in passed] for passed in boundaries)
    everywhere = {"mkdir", "create", "write", "fsync", "report", "reported", "verdict"}
    assert set(second) == everywhere
    assert set(first) == everywhere | {"rename", "pointer", "remove"}
    assert 2 * (len(first) + len(second)) >= 60  # one rank killed, and all


@pytest.mark.parametrize("kills_all", [False, True], ids=["one", "all"])
@pytest.mark.parametrize(
    "rank", [pytest.param(0, id="first", marks=pytest.mark.long), pytest.param(1, id="second")]
)
def test_the_next_attempt_finds_the_newest_intact_checkpoint(
    rank: int, kills_all: bool, saved: Path, boundaries: list[list[Boundary]], tmp_path: Path
) -> None:
    for fatal, boundary in enumerate(boundaries[rank]):
        run_dir = tmp_path / str(fatal)
        shutil.copytree(saved, run_dir)
        pool = RankPool(N_RANKS)
        pids = pool.run(pid, ())
        others = [p for p in pids if p != pids[rank]]
        killer = Killer(rank, fatal, (*(others if kills_all else []), pids[rank]))
        with pytest.raises(RankFailed) as failed:
            pool.run(save, (run_dir, take_over(run_dir), [3], killer))
        where = f"killed at {boundary}: {failed.value}"
        assert f"rank {rank}: no answer" in where
        # The other rank loses its connection, unless the first has all reports and continues alone.
        if not kills_all and (rank == 0 or boundary[0] in ("mkdir", "create", "write", "fsync", "report")):
            assert re.search(r"Connection (closed|reset) by peer", where), where
        assert resumed_step(run_dir) in steps_to_find(rank, fatal, boundaries), where


def steps_to_find(rank: int, fatal: int, boundaries: list[list[Boundary]]) -> set[int]:
    """Return which steps may be the newest intact ones after a death at this boundary."""
    if rank == 0:
        return {2} if fatal <= boundaries[0].index(("rename", "step-00000003")) else {3}
    # Once the second rank has reported, the first may or may not rename the checkpoint before it is killed.
    return {2} if boundaries[rank][fatal][0] not in ("reported", "verdict") else {2, 3}


def resumed_step(run_dir: Path) -> int:
    """Resume on one rank; check that the newest checkpoint is intact and can be resumed. Return its step."""
    join_alone()
    groups = Groups(Layout(1), 0, torch.device("cpu"), timeout_s=30)
    saver = saver_of(run_dir, groups, CFG, token=take_over(run_dir))
    found = saver.find_intact()
    assert found is not None
    path, manifest = found
    names = [entry.name for entry in (run_dir / CHECKPOINTS).iterdir()]
    assert all(name == POINTER_FILE or re.fullmatch(r"step-\d{8}", name) for name in names), names
    check_whole(path)
    saver.save(small_rank_state(4, 0, 1), state_at(4))
    saver.close()
    check_whole(list_checkpoints(run_dir)[0])
    groups.close()
    return manifest.state.step


def check_whole(path: Path) -> None:
    manifest = verify_checkpoint(path)
    reader, n = TensorReader(path, manifest), prod(SMALL_SHAPE)
    got = torch.empty(n)
    for kind in SMALL_KINDS:
        reader.read_shard("w", kind, Shard(0, n, 0, n), got)
        assert torch.equal(got, small_values(manifest.state.step, kind))
