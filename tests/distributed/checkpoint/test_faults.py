"""Failures during a save or at the beginning of an attempt, other than deaths.

No intact checkpoint is renamed, and a failed save is reported on every rank.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import turnout.training.checkpoint.manifest
from tests.checkpoints import ALL_KEPT, save_alone, saver_of, small_rank_state, small_values, state_at
from tests.ranks import RankFailed, RankPool
from tests.runs import run_config
from turnout.data.files import sha256_of
from turnout.training.checkpoint.directory import (
    CHECKPOINTS,
    POINTER_FILE,
    checkpoint_path,
    list_checkpoints,
    newest_readable,
    set_aside,
    unfinished_path,
    verify_checkpoint,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import MANIFEST_SUM, rank_file
from turnout.training.checkpoint.resharding import Shard
from turnout.training.checkpoint.saver import Saver
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.errors import CheckpointError, SaveError, TakenOverError
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over

CFG = run_config().model_copy(update={"checkpoint": ALL_KEPT})
ASYNC = run_config().model_copy(update={"checkpoint": ALL_KEPT.model_copy(update={"async_save": True})})


class ScriptedDisk(Disk):
    """Calls at every boundary, with its name and the path."""

    def __init__(self, call: Callable[[str, Path], None]) -> None:
        self.boundary = call  # type: ignore[method-assign]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has steps 1 and 2."""
    save_alone(tmp_path / "run", [1, 2])
    return tmp_path / "run"


def alone(run_dir: Path, call: Callable[[str, Path], None] = lambda *_: None, token: str = "") -> Saver:
    groups = Groups(Layout(1), 0, torch.device("cpu"), timeout_s=30)
    return saver_of(run_dir, groups, CFG, token=token or take_over(run_dir), disk=ScriptedDisk(call))


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / CHECKPOINTS).iterdir()} - {POINTER_FILE}


def test_a_checkpoint_that_cannot_be_read_keeps_its_name(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, on_read: Callable[[int], None] | None = None) -> str:
        if path == checkpoint_path(run_dir, 2) / rank_file(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(path, on_read)

    monkeypatch.setattr(turnout.training.checkpoint.manifest, "sha256_of", fail)
    saver, events = alone(run_dir), list[str]()
    found = saver.find_intact(events.append)
    assert found is not None and found[0] == checkpoint_path(run_dir, 1)
    (event,) = events
    assert event.startswith(f"not used: {checkpoint_path(run_dir, 2) / rank_file(0)}: cannot be read: ")
    assert names(run_dir) == {"step-00000001", "step-00000002"}
    saver.close()


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(run_dir: Path) -> None:
    for path in list_checkpoints(run_dir):
        set_aside(path, Disk())
    with pytest.raises(CheckpointError, match=r"2\.damaged: set aside as damaged; .*1\.damaged"):
        newest_readable(run_dir)


def test_an_attempt_that_lost_the_run_removes_nothing(run_dir: Path) -> None:
    old, new = take_over(run_dir), take_over(run_dir)
    unfinished_path(run_dir, 3, new).mkdir()
    with pytest.raises(TakenOverError):
        alone(run_dir, token=old)
    assert unfinished_path(run_dir, 3, new).is_dir()


def test_an_attempt_whose_unfinished_save_was_removed_reports_that_it_lost_the_run(run_dir: Path) -> None:
    """A message about the disk would suggest --resume, which would take the run from the later attempt."""

    def sweep(boundary: str, path: Path) -> None:
        if boundary == "create" and path.name == rank_file(0):
            take_over(run_dir)
            shutil.rmtree(path.parent)

    with pytest.raises(TakenOverError):
        alone(run_dir, sweep).save(small_rank_state(3, 0, 1), state_at(3))
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_checkpoint_that_has_lost_a_file_gets_no_name(run_dir: Path) -> None:
    def lose(boundary: str, path: Path) -> None:
        if boundary == "fsync" and path.name == MANIFEST_SUM:
            path.with_name(rank_file(0)).unlink()

    with pytest.raises(SaveError, match=f"{rank_file(0)}: is missing; the newest checkpoint is .*00000002"):
        alone(run_dir, lose).save(small_rank_state(3, 0, 1), state_at(3))
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_failing_pointer_file_fails_no_checkpoint(run_dir: Path) -> None:
    (run_dir / CHECKPOINTS / POINTER_FILE).unlink()
    (run_dir / CHECKPOINTS / POINTER_FILE).mkdir()
    alone(run_dir).save(small_rank_state(3, 0, 1), state_at(3))
    assert verify_checkpoint(checkpoint_path(run_dir, 3)).state.step == 3


def test_the_old_checkpoint_of_a_step_is_removed_after_the_new_one_has_its_name(run_dir: Path) -> None:
    passed: list[tuple[str, str]] = []
    again = small_rank_state(9, 0, 1)  # other values, for step 2
    alone(run_dir, lambda boundary, path: passed.append((boundary, path.name))).save(again, state_at(2))
    boundaries = [boundary for boundary, _ in passed]
    assert ("rename", "step-00000002") in passed
    assert boundaries.index("remove") > passed.index(("rename", "step-00000002"))
    path, got = checkpoint_path(run_dir, 2), torch.empty(24)
    TensorReader(path, verify_checkpoint(path)).read_shard("w", "master", Shard(0, 24, 0, 24), got)
    assert torch.equal(got, small_values(9, "master"))
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def poll_while_one_rank_fails(rank: int, run_dir: Path, token: str) -> None:
    """Save, with an unexpected error in the thread of rank 1, and keep polling, as training does."""

    def fail(boundary: str, path: Path) -> None:
        if boundary == "write" and rank == 1:
            raise MemoryError("no memory for the copy")

    groups = Groups(Layout(2), rank, torch.device("cpu"), timeout_s=30)
    saver = saver_of(run_dir, groups, ASYNC, token=token, disk=ScriptedDisk(fail))
    saver.save(small_rank_state(3, rank, 2), state_at(3))
    try:
        for _ in range(100):
            saver.poll()
            time.sleep(0.02)
    except MemoryError as err:
        (run_dir / "reported").write_text(str(err))
        os._exit(1)  # as launch/ranks/rank.py does


def test_an_unexpected_error_of_a_save_ends_the_rank_before_the_next_save(run_dir: Path) -> None:
    pool = RankPool(2)
    with pytest.raises(RankFailed, match="rank 1: no answer"):
        pool.run(poll_while_one_rank_fails, (run_dir, take_over(run_dir)))
    assert (run_dir / "reported").read_text() == "no memory for the copy"
