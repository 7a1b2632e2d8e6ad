"""Runs that were killed, damaged or overtaken continue with --resume as if nothing had happened.

Real commands: all processes of a run are killed in the middle of step 13, after step 10 was saved.
"""

import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.checkpoints import saver_of
from tests.distributed.runs.recovery import (
    N_STEPS,
    SAVED_EVERY,
    Ended,
    Started,
    check_same_tensors,
    check_tensorboard,
    copy_run,
    fault_at,
    flip_a_byte,
    kill_at,
    make_place,
    rows_of,
    samples_of,
    samples_seen,
)
from tests.distributed.runs.sabotaged_rank import Fault
from tests.ranks import join_alone
from tests.runs import read_rows
from turnout.launch.run_dir import read_config
from turnout.training.checkpoint.directory import (
    checkpoint_path,
    list_checkpoints,
    list_set_aside,
    read_checkpoint,
    verify_checkpoint,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.errors import TakenOverError
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over

HELD_STEP, NEWEST = 12, 10  # a data step; the step of the newest checkpoint by then


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def begun(place: Path) -> dict[str, Started]:
    """Runs side by side: one undisturbed, the others held at a step until a test disturbs them."""
    kept = ("checkpoint.keep_last=1", "checkpoint.keep_every_steps=10")
    begun = {"straight": Started(place / "straight", *kept)}
    for name in ("killed", "overtaken", "asked"):
        begun[name] = Started(place / name, faults=(hold_in(place, name),))
    return begun


def hold_in(place: Path, name: str) -> Fault:
    return fault_at(place, "hold", HELD_STEP, name)


@pytest.fixture(scope="module")
def straight(begun: dict[str, Started]) -> Ended:
    return begun["straight"].wait()


@pytest.fixture(scope="module")
def killed(begun: dict[str, Started], place: Path) -> Path:
    return kill_at(begun["killed"], hold_in(place, "killed"), saved_step=NEWEST)


def check_as_if_nothing_happened(resumed: Ended, straight: Ended) -> None:
    assert not resumed.stderr, resumed.stderr
    assert rows_of(resumed.run_dir) == rows_of(straight.run_dir)
    check_same_tensors(resumed.checkpoint(N_STEPS), straight.checkpoint(N_STEPS))
    got, want = (read_checkpoint(run.checkpoint(N_STEPS)).state for run in (resumed, straight))
    assert got == want
    check_tensorboard(resumed.run_dir)
    got_text, want_text = (
        run.stdout.partition("--- sample ---")[2].splitlines()[1] for run in (resumed, straight)
    )
    assert got_text == want_text


def kept(run_dir: Path) -> list[int]:
    return [read_checkpoint(path).state.step for path in list_checkpoints(run_dir)]


def test_a_killed_run_resumes_bit_for_bit(straight: Ended, killed: Path) -> None:
    assert kept(straight.run_dir) == [20, 10]
    assert [row["step"] for row in read_rows(killed)][-1] == HELD_STEP, "no rows to drop"
    resumed = Started(copy_run(killed, "resumed"), is_resumed=True).wait()
    check_as_if_nothing_happened(resumed, straight)
    sources = [line for line in resumed.stdout.splitlines() if line.startswith("resuming")]
    assert sources == [f"resuming from {Path('resumed') / 'checkpoints' / 'step-00000010'}"]
    assert kept(resumed.run_dir) == [20, 15, 10]
    assert (resumed.run_dir / "logs" / "attempt-00001").is_dir(), "the first attempt's logs are still there"
    again = Started(resumed.run_dir, is_resumed=True).wait()
    assert again.stdout == f"nothing left to do: resumed has all {N_STEPS} steps of train.n_steps\n"
    flip_a_byte(resumed.checkpoint(N_STEPS) / "rank-00000.safetensors")
    redone = Started(resumed.run_dir, is_resumed=True).wait()
    assert "step-00000020.damaged" in redone.stdout and "step-00000015\n" in redone.stdout
    check_as_if_nothing_happened(redone, straight)


def test_a_run_asked_to_end_saves_its_step_and_resumes_bit_for_bit(
    straight: Ended, begun: dict[str, Started], place: Path
) -> None:
    asked, hold = begun["asked"], hold_in(place, "asked")
    asked.wait_for(Path(hold.mark), checkpoint_path(asked.run_dir, NEWEST))
    asked.terminate()
    asked.terminate()  # a cluster may send SIGTERM more than once
    Path(f"{hold.mark}.release").touch()
    ended = asked.wait(code=75)
    saved = kept(ended.run_dir)[0]
    assert saved % SAVED_EVERY and saved in (HELD_STEP, HELD_STEP + 1), saved
    assert f"stopped after step {saved}, as asked" in ended.stdout
    assert read_rows(ended.run_dir)[-1]["step"] == saved
    check_as_if_nothing_happened(Started(ended.run_dir, is_resumed=True).wait(), straight)


@dataclass(frozen=True)
class OtherLayout:
    nproc: int
    settings: tuple[str, ...]
    now: str


OTHER_LAYOUTS = (
    OtherLayout(1, ("parallel.ep=1", "train.microbatch_seqs=4"), "world_size=1 tp=1 ep=1 zero_stage=1"),
    OtherLayout(4, ("parallel.tp=2", "parallel.zero_stage=2"), "world_size=4 tp=2 ep=2 zero_stage=2"),
)


def test_a_run_resumes_under_another_layout_with_the_same_samples(
    straight: Ended, killed: Path, tmp_path: Path
) -> None:
    begun = {}
    for to in OTHER_LAYOUTS:
        run_dir = copy_run(killed, f"at-{to.nproc}")
        (seen := tmp_path / run_dir.name).mkdir()
        begun[to] = Started(run_dir, *to.settings, nproc=to.nproc, is_resumed=True, seen=seen)
    for to, started in begun.items():
        moved = started.wait()
        assert samples_seen(tmp_path / moved.run_dir.name, N_STEPS - NEWEST) == [
            sorted(samples_of(killed.parent, data_step)) for data_step in range(NEWEST, N_STEPS)
        ]
        for got, want in zip(rows_of(moved.run_dir), rows_of(straight.run_dir), strict=True):
            assert got.keys() == want.keys()
            for name in want.keys() & {"train/loss", "train/lr", "train/tokens_seen", "eval/loss"}:
                assert got[name] == pytest.approx(want[name], rel=1e-5), (to, want["step"], name)
        changed = f"step-00000010, saved with world_size=2 tp=1 ep=2 zero_stage=1, now {to.now}"
        assert changed in moved.stdout
        assert changed in (moved.run_dir / "logs" / "rank-00000.log").read_text()


@pytest.fixture(scope="module")
def damaged(killed: Path) -> dict[str, Started]:
    """Two resumed runs: one with its newest checkpoint damaged, one with all of them."""
    newest, both = copy_run(killed, "newest-damaged"), copy_run(killed, "both-damaged")
    flip_a_byte(checkpoint_path(newest, 10) / "rank-00001.safetensors")
    flip_a_byte(checkpoint_path(both, 10) / "rank-00000.safetensors")
    flip_a_byte(checkpoint_path(both, 5) / "router.safetensors")
    return {run_dir.name: Started(run_dir, is_resumed=True) for run_dir in (newest, both)}


def test_a_damaged_newest_checkpoint_is_reported_set_aside_and_passed_over(
    straight: Ended, damaged: dict[str, Started]
) -> None:
    resumed = damaged["newest-damaged"].wait()
    name = Path("newest-damaged") / "checkpoints" / "step-00000010"
    reported, resumed_from = (line for line in resumed.stdout.splitlines() if str(name.parent) in line)
    assert re.fullmatch(
        rf"not used: {name}/rank-00001.safetensors: SHA-256 [0-9a-f]{{16}}\.\., but the manifest says "
        rf"[0-9a-f]{{16}}\.\.; renamed to {name}.damaged",
        reported,
    )
    assert resumed_from == f"resuming from {name.with_name('step-00000005')}"
    assert [path.name for path in list_set_aside(resumed.run_dir)] == ["step-00000010.damaged"]
    assert kept(resumed.run_dir) == [20, 15, 10], "the step was saved again"
    check_as_if_nothing_happened(resumed, straight)


def test_a_run_whose_checkpoints_are_all_damaged_reports_each(damaged: dict[str, Started]) -> None:
    ended = damaged["both-damaged"].wait(code=4)
    check_both_reported(ended.reason)
    assert kept(ended.run_dir) == [10, 5], "renamed, they would let the next attempt begin at step 1"
    rows = read_rows(ended.run_dir)
    check_both_reported(Started(ended.run_dir, is_resumed=True).wait(code=4).reason)
    assert read_rows(ended.run_dir) == rows


def check_both_reported(reason: str) -> None:
    assert "no intact checkpoint" in reason and reason.endswith("to start from the first step")
    for file in ("step-00000010/rank-00000.safetensors", "step-00000005/router.safetensors"):
        assert re.search(rf"{file}: SHA-256 \S+, but the manifest says", reason), reason


def test_an_overtaken_attempt_never_commits(straight: Ended, begun: dict[str, Started], place: Path) -> None:
    """A rank of the first attempt is held, as on a node that was cut off, and comes back too late.

    Its command is suspended too, since it would have ended the ranks.
    """
    stale, hold = begun["overtaken"], hold_in(place, "overtaken")
    run_dir = stale.run_dir
    stale.wait_for(Path(hold.mark), checkpoint_path(run_dir, NEWEST))
    stale.suspend()
    old_token = (run_dir / "owner").read_text().strip()
    later = Started(run_dir, "checkpoint.async_save=false", is_resumed=True).wait()
    new_token = (run_dir / "owner").read_text().strip()
    lasting = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and is_lasting(path)}
    Path(f"{hold.mark}.release").touch()
    failures = [run_dir / "logs" / "attempt-00001" / f"rank-0000{rank}.failure.json" for rank in range(2)]
    stale.wait_for(*failures)
    stale.continue_when_ranks_are_gone()
    reason = stale.wait(code=1).reason
    # Step 15 was being committed in the background, so the error comes a few steps later.
    assert re.fullmatch(
        rf"ranks 0, 1: (step \d+: )?{Path('overtaken') / 'owner'}: another attempt of this run has "
        rf"taken over \(token {new_token}, this one has {old_token}\); nothing was committed\. "
        "Let the other one continue",
        reason,
    ), reason
    assert {path: path.read_bytes() for path in lasting} == lasting
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"latest", *(f"step-000000{step}" for step in (10, 15, 20))}
    check_as_if_nothing_happened(later, straight)


def is_lasting(path: Path) -> bool:
    """Return whether a file must stay the same when an earlier attempt comes back.

    The first attempt's own files may change, and the ranks' logs, to which every attempt appends.
    """
    return not {"attempt-00001", "tensorboard"} & set(path.parts) and path.suffix != ".log"


def test_an_overtaken_attempt_renames_nothing(killed: Path) -> None:
    """It searches for a checkpoint when it rolls back, but a damaged one belongs to the later attempt."""
    run_dir = copy_run(killed, "renames-nothing")
    flip_a_byte(checkpoint_path(run_dir, NEWEST) / "router.safetensors")
    old_token, _ = take_over(run_dir), take_over(run_dir)
    join_alone()
    groups = Groups(Layout(1), 0, torch.device("cpu"), timeout_s=30)
    with pytest.raises(TakenOverError, match="another attempt of this run has taken over"):
        saver_of(run_dir, groups, read_config(run_dir), token=old_token).find_intact()
    groups.close()
    assert kept(run_dir) == [10, 5]


class RefusingDisk(Disk):
    def rename(self, source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_passed_over(killed: Path) -> None:
    run_dir = copy_run(killed, "not-renamed")
    flip_a_byte(checkpoint_path(run_dir, NEWEST) / "router.safetensors")
    join_alone()
    groups, reported = Groups(Layout(1), 0, torch.device("cpu"), timeout_s=30), list[str]()
    cfg, token = read_config(run_dir), take_over(run_dir)
    found = saver_of(run_dir, groups, cfg, token=token, disk=RefusingDisk()).find_intact(reported.append)
    groups.close()
    assert found is not None and found[0] == checkpoint_path(run_dir, 5)
    assert len(reported) == 1 and "it could not be renamed: [Errno 13] Permission denied" in reported[0]


def no_large_files() -> None:
    """Forbid a run's processes to write a file as large as a rank's part of a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_the_way_out(
    straight: Ended, killed: Path
) -> None:
    """In one run large files are refused; in the other a file has the name of the checkpoints' directory."""
    full, misplaced = copy_run(killed, "full"), copy_run(killed, "misplaced")
    shutil.rmtree(misplaced / "checkpoints")
    (misplaced / "checkpoints").touch()
    begun = [Started(full, is_resumed=True, preexec=no_large_files), Started(misplaced, is_resumed=True)]
    ended = [started.wait(code=1) for started in begun]

    file = r"full/checkpoints/step-00000015\.[0-9a-f]{16}\.tmp/rank-0000%d\.safetensors"
    refused = r"rank %d: \[Errno 27\] File too large: '" + file + "'"
    way_out = "free space or repair the disk, then resume with --resume"
    assert re.fullmatch(
        rf"ranks 0, 1: (step \d+: )?step 15 could not be saved: {refused % (0, 0)}; {refused % (1, 1)}; "
        rf"the newest checkpoint is full/checkpoints/step-00000010; {way_out}",
        ended[0].reason,
    ), ended[0].reason
    assert verify_checkpoint(checkpoint_path(full, NEWEST)).state.step == NEWEST
    assert {path.name for path in (full / "checkpoints").iterdir()} == {
        "latest",
        "step-00000005",
        "step-00000010",
    }
    assert re.fullmatch(
        rf"ranks 0, 1: (step \d+: )?step 5 could not be saved: rank 0: \[Errno \d+\] \S.*; rank 1: .*; "
        rf"there is no checkpoint yet; {way_out}",
        ended[1].reason,
    ), ended[1].reason

    (misplaced / "checkpoints").unlink()
    repaired = [Started(run_dir, is_resumed=True) for run_dir in (full, misplaced)]
    resumed, restarted = (started.wait() for started in repaired)
    check_as_if_nothing_happened(resumed, straight)
    check_as_if_nothing_happened(restarted, straight)
    assert "misplaced has no checkpoint yet: starting again from the first step\n" in restarted.stdout
