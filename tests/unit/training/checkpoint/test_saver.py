"""Saves of one rank: training meanwhile, a death at any boundary, later attempts, damage, and retention.

Deaths with more ranks are tested in tests/distributed/checkpoint/test_kills.py.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch

from tests.checkpoints import (
    ALL_KEPT,
    SMALL_KINDS,
    SMALL_SHAPE,
    save_alone,
    saver_of,
    small_rank_state,
    small_values,
    state_at,
)
from tests.layouts import groups_of
from tests.runs import run_config
from tests.unit.hostile_fixtures import put_manifest
from turnout.launch.verify import newest_intact
from turnout.training.checkpoint.directory import (
    CHECKPOINTS,
    POINTER_FILE,
    checkpoint_path,
    list_checkpoints,
    newest_readable,
    step_of,
    verify_checkpoint,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import FORMAT_VERSION, MANIFEST, ROUTER_FILE, rank_file
from turnout.training.checkpoint.resharding import Shard
from turnout.training.checkpoint.saver import Saver
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.config.checkpoint import CheckpointConfig
from turnout.training.errors import CheckpointError, TakenOverError, UnknownVersionError
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over

TWO_KEPT = CheckpointConfig(every_steps=1, keep_last=2, async_save=False)
IN_BACKGROUND = ALL_KEPT.model_copy(update={"async_save": True})
DEADLINE_S = 20
OnBoundary = Callable[[str, Path], None]


class WatchedDisk(Disk):
    """Calls at every boundary, with its name and the path."""

    def __init__(self, call: OnBoundary) -> None:
        self._call = call

    def boundary(self, name: str, path: Path) -> None:
        self._call(name, path)


class Death(BaseException):
    """Ends a save where it is: no error handling catches this."""


@pytest.fixture(scope="module")
def saved(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    save_alone(run_dir, [1, 2])
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def new_attempt(
    run_dir: Path, kept: CheckpointConfig = ALL_KEPT, call: OnBoundary = lambda *_: None
) -> Saver:
    """Return the saver of a new attempt, which now owns the run."""
    cfg = run_config().model_copy(update={"checkpoint": kept})
    groups = groups_of(Layout(1), 0)
    return saver_of(run_dir, groups, cfg, token=take_over(run_dir), disk=WatchedDisk(call))


def save(saver: Saver, step: int) -> None:
    saver.save(small_rank_state(step, 0, 1), state_at(step))


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / CHECKPOINTS).iterdir()} - {POINTER_FILE}


def check_whole(run_dir: Path, step: int) -> None:
    """Check that a checkpoint is intact and holds the values of its step."""
    path, n = checkpoint_path(run_dir, step), prod(SMALL_SHAPE)
    reader, got = TensorReader(path, verify_checkpoint(path)), torch.empty(n)
    for kind in SMALL_KINDS:
        reader.read_shard("w", kind, Shard(0, n, 0, n), got)
        assert torch.equal(got, small_values(step, kind)), kind
    bias = torch.empty(3)
    reader.read_named(ROUTER_FILE, "bias", bias)
    assert bias.tolist() == [step] * 3


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_after_a_death_at_any_boundary_the_newest_intact_one_is_found(saved: Path, tmp_path: Path) -> None:
    passed: list[tuple[str, str]] = []
    run_dir = Path(shutil.copytree(saved, tmp_path / "whole"))
    saver = new_attempt(run_dir, TWO_KEPT, lambda boundary, path: passed.append((boundary, path.name)))
    save(saver, 3)
    saver.close()
    assert names(run_dir) == {"step-00000002", "step-00000003"}
    assert {kind for kind, _ in passed} >= {
        "mkdir",
        "create",
        "write",
        "fsync",
        "rename",
        "pointer",
        "remove",
    }
    named_at = passed.index(("rename", "step-00000003"))
    for fatal, boundary in enumerate(passed):
        run_dir = Path(shutil.copytree(saved, tmp_path / str(fatal)))
        die_at_boundary(run_dir, fatal)
        saver = new_attempt(run_dir, TWO_KEPT)
        found = saver.find_intact()
        assert found is not None
        assert found[1].state.step == (2 if fatal <= named_at else 3), f"died at {boundary}"
        check_whole(run_dir, found[1].state.step)
        assert all(re.fullmatch(r"step-\d{8}", name) for name in names(run_dir)), f"died at {boundary}"
        saver.close()


def die_at_boundary(run_dir: Path, fatal: int) -> None:
    """Save step 3, and die at the boundary of this number."""
    n_passed = 0

    def die(boundary: str, path: Path) -> None:
        nonlocal n_passed
        n_passed += 1
        if n_passed == fatal + 1:
            raise Death(boundary)

    saver = new_attempt(run_dir, TWO_KEPT, die)
    with pytest.raises(Death):
        save(saver, 3)
    saver.close()


def test_training_may_change_tensors_while_they_are_written(run_dir: Path) -> None:
    is_trained_on = threading.Event()

    def hold(boundary: str, path: Path) -> None:
        assert boundary != "mkdir" or is_trained_on.wait(DEADLINE_S)

    saver, rank_state = new_attempt(run_dir, IN_BACKGROUND, hold), small_rank_state(3, 0, 1)
    saver.save(rank_state, state_at(3))
    for tensor in (*rank_state.tensors.values(), *rank_state.router.values()):
        tensor.fill_(-1.0)
    is_trained_on.set()
    saver.close()
    check_whole(run_dir, 3)


def test_a_save_waits_for_the_one_before_it(run_dir: Path) -> None:
    """Both copy into the same buffers, and the earlier one still writes from them."""

    def slow_down(boundary: str, path: Path) -> None:
        if boundary == "mkdir" and path.name.startswith("step-00000003"):
            time.sleep(0.2)  # the second save is requested meanwhile

    saver = new_attempt(run_dir, IN_BACKGROUND, slow_down)
    save(saver, 3)
    save(saver, 4)
    saver.close()
    check_whole(run_dir, 3)
    check_whole(run_dir, 4)


def test_an_attempt_that_loses_the_run_while_it_writes_commits_nothing(run_dir: Path) -> None:
    def overtake(boundary: str, path: Path) -> None:
        if boundary == "create" and path.name == MANIFEST:
            take_over(run_dir)

    saver = new_attempt(run_dir, call=overtake)
    with pytest.raises(TakenOverError, match="nothing was committed"):
        save(saver, 3)
    saver.close()
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_an_attempt_whose_files_a_later_one_removed_reports_the_loss_of_the_run(run_dir: Path) -> None:
    def overtake_and_sweep(boundary: str, path: Path) -> None:
        if boundary == "create" and path.name == ROUTER_FILE:  # after the first check of the fencing token
            take_over(run_dir)
            shutil.rmtree(path.parent)

    saver = new_attempt(run_dir, call=overtake_and_sweep)
    with pytest.raises(TakenOverError, match="nothing was committed"):
        save(saver, 3)
    saver.close()
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_save_of_an_earlier_attempt_does_not_disturb_the_later_one(run_dir: Path) -> None:
    is_later_writing = threading.Event()

    def hold(boundary: str, path: Path) -> None:
        assert boundary != "report" or is_later_writing.wait(DEADLINE_S)

    def let_the_earlier_end(boundary: str, path: Path) -> None:
        if boundary == "create" and path.name == MANIFEST:
            is_later_writing.set()
            with pytest.raises(TakenOverError):
                earlier.wait()

    earlier = new_attempt(run_dir, IN_BACKGROUND, hold)
    earlier.save(small_rank_state(9, 0, 1), state_at(3))  # other values
    later = new_attempt(run_dir, call=let_the_earlier_end)
    save(later, 3)
    later.close()
    earlier.close()
    check_whole(run_dir, 3)


def test_an_attempt_that_lost_the_run_renames_nothing(run_dir: Path) -> None:
    flip_a_byte(checkpoint_path(run_dir, 2) / rank_file(0))
    saver = new_attempt(run_dir)
    take_over(run_dir)
    with pytest.raises(TakenOverError):
        saver.find_intact()
    saver.close()
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_damaged_checkpoint_is_renamed_each_time(run_dir: Path) -> None:
    for _ in range(2):
        flip_a_byte(checkpoint_path(run_dir, 2) / rank_file(0))
        saver, events = new_attempt(run_dir), list[str]()
        found = saver.find_intact(events.append)
        assert found is not None and found[0] == checkpoint_path(run_dir, 1)
        (event,) = events
        assert f"{checkpoint_path(run_dir, 2) / rank_file(0)}: SHA-256 " in event
        assert event.endswith(f"; renamed to {checkpoint_path(run_dir, 2)}.damaged")
        assert names(run_dir) == {"step-00000001", "step-00000002.damaged"}
        save(saver, 2)
        saver.close()
        check_whole(run_dir, 2)


def test_if_all_are_damaged_they_keep_their_names(run_dir: Path) -> None:
    for step in (1, 2):
        flip_a_byte(checkpoint_path(run_dir, step) / rank_file(0))
    saver = new_attempt(run_dir)
    with pytest.raises(CheckpointError, match="no intact checkpoint: .*step-00000002.*step-00000001"):
        saver.find_intact()
    saver.close()
    assert names(run_dir) == {"step-00000001", "step-00000002"}


def test_a_save_keeps_the_newest_and_the_multiples(run_dir: Path) -> None:
    kept = ALL_KEPT.model_copy(update={"keep_last": 2, "keep_every_steps": 3})
    saver = new_attempt(run_dir, kept)
    for step in range(3, 9):
        save(saver, step)
    saver.close()
    assert [step_of(path) for path in list_checkpoints(run_dir)] == [8, 7, 6, 3]
    assert (run_dir / CHECKPOINTS / POINTER_FILE).read_text() == "step-00000008\n"


def test_every_byte_and_name_is_on_the_disk_before_the_checkpoint_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        fsync(fd)
        events.append(str(Path(f"/proc/self/fd/{fd}").readlink()))

    def note_name(boundary: str, path: Path) -> None:
        if boundary == "rename":
            events.append(f"rename {path.name}")

    saver = new_attempt(run_dir, call=note_name)
    monkeypatch.setattr(os, "fsync", noted)
    save(saver, 3)
    saver.close()
    named_at = events.index("rename step-00000003")
    flushed = {Path(event) for event in events[:named_at]}
    (unfinished,) = {path.parent for path in flushed if path.name == MANIFEST}
    files = {path.name for path in checkpoint_path(run_dir, 3).iterdir()}
    assert flushed == {unfinished, *(unfinished / name for name in files)}
    assert events[named_at + 1] == str(run_dir / CHECKPOINTS), "the new name is flushed"


def test_the_newest_checkpoint_has_the_largest_step(tmp_path: Path) -> None:
    steps = (99_999_999, 100_000_000, 7, 1_234_567_890)
    for step in steps:
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    for name in ("step-00000008.ab12.tmp", "step-00000009.damaged", "step-10", "latest"):
        (tmp_path / CHECKPOINTS / name).mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == sorted(steps, reverse=True)


def test_a_checkpoint_of_a_later_release_stops_the_run_and_keeps_its_name(run_dir: Path) -> None:
    """An older one would lose the steps that the later release has taken."""
    path = checkpoint_path(run_dir, 2)
    tree = json.loads((path / MANIFEST).read_bytes())
    put_manifest(path, json.dumps(tree | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(UnknownVersionError, match="use the version of Turnout that wrote it"):
        newest_readable(run_dir)
    saver = new_attempt(run_dir)
    with pytest.raises(UnknownVersionError, match="use the version of Turnout that wrote it"):
        saver.find_intact()
    saver.close()
    with pytest.raises(UnknownVersionError):
        newest_intact(run_dir, lambda _: None)
    assert names(run_dir) == {"step-00000001", "step-00000002"}
