"""What goes wrong around a save or a start, short of a death: nothing that is intact loses its name, and what
cannot be saved is told on every rank.
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
from tests.checkpoints import ALL_KEPT, save_alone, saver_of, small_numbers, small_rank_state, state_at
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
        self.at = call  # type: ignore[method-assign]


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
    saver, told = alone(run_dir), list[str]()
    found = saver.find_intact(told.append)
    assert found is not None and found[0] == checkpoint_path(run_dir, 1)
    (line,) = told
    assert line.startswith(f"not used: {checkpoint_path(run_dir, 2) / rank_file(0)}: cannot be read: ")
    assert names(run_dir) == {"step-00000001", "step-00000002"}
    saver.close()


def test_a_run_of_which_only_what_was_set_aside_is_left_is_not_begun_anew(run_dir: Path) -> None:
    for path in list_checkpoints(run_dir):
        set_aside(path, Disk())
    with pytest.raises(CheckpointError, match=r"2\.damaged: set aside as damaged; .*1\.damaged"):
        newest_readable(run_dir)


def test_a_start_that_was_overtaken_sweeps_nothing(run_dir: Path) -> None:
    old, new = take_over(run_dir), take_over(run_dir)
    unfinished_path(run_dir, 3, new).mkdir()
    with pytest.raises(TakenOverError):
        alone(run_dir, token=old)
    assert unfinished_path(run_dir, 3, new).is_dir()


def test_a_start_whose_unfinished_save_was_swept_is_told_that_it_was_overtaken(run_dir: Path) -> None:
    """It must not be told to make room and start again, which would take the run from the later start."""

    def sweep(boundary: str, path: Path) -> None:
        if boundary == "create" and path.name == rank_file(0):
            take_over(run_dir)
            shutil.rmtree(path.parent)

    with pytest.raises(TakenOverError):
        alone(run_dir, sweep).save(small_rank_state(3, 0, 1), state_at(3))
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_checkpoint_of_which_a_file_was_lost_gets_no_name(run_dir: Path) -> None:
    def lose(boundary: str, path: Path) -> None:
        if boundary == "fsync" and path.name == MANIFEST_SUM:
            path.with_name(rank_file(0)).unlink()

    with pytest.raises(SaveError, match=f"{rank_file(0)}: is missing; the newest checkpoint is .*00000002"):
        alone(run_dir, lose).save(small_rank_state(3, 0, 1), state_at(3))
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_pointer_that_cannot_be_written_fails_no_checkpoint(run_dir: Path) -> None:
    (run_dir / CHECKPOINTS / POINTER_FILE).unlink()
    (run_dir / CHECKPOINTS / POINTER_FILE).mkdir()
    alone(run_dir).save(small_rank_state(3, 0, 1), state_at(3))
    assert verify_checkpoint(checkpoint_path(run_dir, 3)).state.step == 3


def test_a_step_that_is_saved_again_is_removed_once_its_successor_has_the_name(run_dir: Path) -> None:
    passed: list[tuple[str, str]] = []
    again = small_rank_state(9, 0, 1)  # other numbers, for step 2
    alone(run_dir, lambda boundary, path: passed.append((boundary, path.name))).save(again, state_at(2))
    boundaries = [boundary for boundary, _ in passed]
    assert ("rename", "step-00000002") in passed
    assert boundaries.index("remove") > passed.index(("rename", "step-00000002"))
    path, got = checkpoint_path(run_dir, 2), torch.empty(24)
    TensorReader(path, verify_checkpoint(path)).read_shard("w", "master", Shard(0, 24, 0, 24), got)
    assert torch.equal(got, small_numbers(9, "master"))
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def poll_while_one_rank_fails(rank: int, run_dir: Path, token: str) -> None:
    """Save, as a rank whose thread comes upon what no save should raise, and train on."""

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
        (run_dir / "told").write_text(str(err))
        os._exit(1)  # as launch/ranks/rank.py does


def test_a_rank_whose_save_fails_as_none_should_ends_and_not_only_at_the_next_save(run_dir: Path) -> None:
    pool = RankPool(2)
    with pytest.raises(RankFailed, match="rank 1: no answer"):
        pool.run(poll_while_one_rank_fails, (run_dir, take_over(run_dir)))
    assert (run_dir / "told").read_text() == "no memory for the copy"
