"""What a run does when its loss is not finite or jumps, or its routers collapse: each policy of `guard`.

Real commands; in their second rank the loss of chosen samples goes wrong.
"""

import re
from pathlib import Path

import pytest

from tests.distributed.runs.recovery import (
    Started,
    check_equal,
    check_tensorboard,
    fault_at,
    kill_at,
    make_place,
    n_fired,
    rows_of,
    stored_tensors,
)
from tests.distributed.runs.sabotaged_rank import Fault
from tests.runs import read_rows
from turnout.data.skips import SkippedWindow, read_skips
from turnout.training.checkpoint.directory import list_checkpoints, verify_checkpoint
from turnout.training.loop import SKIPPED_FILE

SPIKES = ("guard.spike_window_steps=5",)
# Each token uses two of four experts: even perfect balance gives each expert a quarter of the rows.
COLLAPSE = ("guard.max_load_frac=0.255", "guard.collapse_patience_steps=7")
NOT_FINITE = r"loss is nan, gradient norm is \S+"
SPIKED = r"loss \S+ is \S+ standard deviations above its mean \S+ \(limit guard\.spike_sigma=6\)"
COLLAPSED = (
    r"layer [01] sends 0\.\d+ of its rows to expert [0-3], above guard\.max_load_frac=0\.255 for 7 steps"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("guard"))


# The slow save of step 6 is still running when step 7 ends the run.
SLOWER_S = {"nan": 3.0, "spike": 0.0, "collapse": 0.0}
STOPS = {
    "nan": (
        ("checkpoint.every_steps=6",),
        rf"ranks 0, 1: step 7: {NOT_FINITE}, not finite on rank 1; the update was not applied\. Lower "
        r"optim\.lr, .*set guard\.on_non_finite=rollback",
    ),
    "spike": (
        ("guard.on_spike=stop", *SPIKES),
        rf"ranks 0, 1: step 7: {SPIKED}; the update was not applied\. .*set guard\.on_spike=rollback",
    ),
    "collapse": (
        ("guard.on_collapse=stop", *COLLAPSE),
        rf"ranks 0, 1: step 7: {COLLAPSED}; the update was not applied\. Raise model\.balance\.coef .*"
        r"set guard\.on_collapse=rollback",
    ),
}


@pytest.fixture(scope="module")
def stopping(place: Path) -> dict[str, Started]:
    """Three runs side by side, each with a different fault at step 7."""
    faults = {kind: (fault_at(place, kind, 6, "stop"),) for kind in ("nan", "spike")}
    return {
        kind: Started(place / f"stop-{kind}", *settings, faults=faults.get(kind, ()), slower_s=SLOWER_S[kind])
        for kind, (settings, _) in STOPS.items()
    }


@pytest.mark.parametrize("kind", STOPS)
def test_stop_ends_the_run_before_the_update_and_says_what_to_do(
    kind: str, stopping: dict[str, Started]
) -> None:
    stopped, (_, message) = stopping[kind].wait(code=1), STOPS[kind]
    assert re.fullmatch(message, stopped.reason), stopped.reason
    assert read_rows(stopped.run_dir)[-1]["step"] == 6
    (newest,) = list_checkpoints(stopped.run_dir)
    assert verify_checkpoint(newest).state.step == (6 if SLOWER_S[kind] else 5)
    assert all(tensor.isfinite().all() for tensor in stored_tensors(newest).values())


@pytest.fixture(scope="module")
def faults(place: Path) -> dict[str, Fault]:
    """The faults of the runs that continue after them."""
    return {
        "skipped nan": fault_at(place, "nan", 7, "skip"),
        "skipped spike": fault_at(place, "spike", 12, "skip"),
        "nan": fault_at(place, "nan", 6, "rollback"),
        "spike": fault_at(place, "spike", 12, "rollback"),
        "hold": fault_at(place, "hold", 14, "rollback"),
        "last nan": fault_at(place, "nan", 18, "rollback"),
    }


ROLLBACKS = ("guard.on_non_finite=rollback", "guard.on_spike=rollback", *SPIKES)


@pytest.fixture(scope="module")
def begun(place: Path, faults: dict[str, Fault]) -> dict[str, Started]:
    """Three runs side by side that continue after their faults."""
    skip = ("guard.on_non_finite=skip", "guard.on_spike=skip", *SPIKES)
    skip += ("checkpoint.every_steps=1", "checkpoint.keep_last=20")
    collapse = ("guard.on_collapse=rollback", *COLLAPSE)
    of_skip, of_rollback = list(faults.values())[:2], list(faults.values())[2:]
    limit = "guard.max_interventions=2"
    return {
        "skip": Started(place / "skip", *skip, faults=tuple(of_skip)),
        "collapse": Started(place / "collapse", *collapse, limit),
        "rollback": Started(place / "rollback", *ROLLBACKS, limit, faults=tuple(of_rollback)),
    }


@pytest.mark.long
def test_skip_leaves_every_weight_as_it_was_and_counts(
    begun: dict[str, Started], faults: dict[str, Fault]
) -> None:
    ended = begun["skip"].wait()
    for step, message in ((8, NOT_FINITE), (13, SPIKED)):
        assert re.search(rf"^step {step}: {message}; its update was skipped$", ended.stdout, re.MULTILINE)
        before, after, next_one = (stored_tensors(ended.checkpoint(step + i)) for i in (-1, 0, 1))
        check_equal(after, before)
        assert any(not tensor.equal(after[name]) for name, tensor in next_one.items())
    rows = rows_of(ended.run_dir)
    assert [row["train/skipped_steps"] for row in rows] == [0] * 7 + [1] * 5 + [2] * 8
    assert [row["step"] for row in rows if row["train/loss"] is None] == [8]
    state = verify_checkpoint(ended.checkpoint(20)).state
    assert (state.n_skipped, state.n_interventions, state.skipped) == (2, 2, ())
    assert n_fired(faults["skipped nan"]) == n_fired(faults["skipped spike"]) == 1


@pytest.mark.long
def test_rollback_skips_the_data_permanently_and_only_as_often_as_allowed(
    begun: dict[str, Started], faults: dict[str, Fault]
) -> None:
    """A loss that is not finite, a spike, a kill; a third fault, one too many; then a higher limit."""
    run_dir = kill_at(begun["rollback"], faults["hold"], saved_step=10)
    left = tuple(faults[name] for name in ("nan", "spike", "last nan"))
    # The second fault came after step 10 was saved, so only the run directory records it.
    assert [window.first for window in verify_checkpoint(list_checkpoints(run_dir)[0]).state.skipped] == [6]
    check_skips(run_dir, (6, rf"step 7: {NOT_FINITE}.*"), (12, f"step 12: {SPIKED}"))

    limit = "guard.max_interventions=2"
    stopped = Started(run_dir, *ROLLBACKS, limit, is_resumed=True, faults=left).wait(code=1)
    assert re.fullmatch(
        rf"ranks 0, 1: step 17: {NOT_FINITE}.*; the update was not applied, and {limit} is used up\. .*",
        stopped.reason,
    ), stopped.reason
    saved = verify_checkpoint(stopped.checkpoint(15)).state
    assert saved.skipped == read_skips(run_dir / SKIPPED_FILE) and saved.n_interventions == 2

    higher = "guard.max_interventions=3"
    ended = Started(run_dir, *ROLLBACKS, higher, is_resumed=True, faults=left).wait()
    assert f"resuming from {Path('rollback') / 'checkpoints' / 'step-00000015'}" in ended.stdout
    assert re.search(
        rf"^step 17: {NOT_FINITE}.*; rolling back, without data steps 18 to 18$", ended.stdout, re.MULTILINE
    )
    state = verify_checkpoint(ended.checkpoint(20)).state
    assert state.skipped == read_skips(run_dir / SKIPPED_FILE) and state.n_interventions == 3
    assert [window.first for window in state.skipped] == [6, 12, 18]
    # The last fault fired in the attempt that it stopped, and in the one that then skipped its data.
    fired = {name: n_fired(fault) for name, fault in faults.items() if not name.startswith("skipped")}
    assert fired == {"nan": 1, "spike": 1, "hold": 1, "last nan": 2}
    assert not any(row["train/loss"] is None or row["train/loss"] > 10 for row in rows_of(run_dir))
    check_tensorboard(run_dir)


def check_skips(run_dir: Path, *wanted: tuple[int, str]) -> None:
    """Check that these data steps are skipped, each for its reason."""
    windows: tuple[SkippedWindow, ...] = read_skips(run_dir / SKIPPED_FILE)
    assert [(window.first, window.last) for window in windows] == [(step, step) for step, _ in wanted]
    for window, (_, reason) in zip(windows, wanted, strict=True):
        assert re.fullmatch(reason, window.reason), window.reason


@pytest.mark.long
def test_a_lasting_collapse_is_rolled_back_up_to_the_limit_and_then_stops_the_run(
    begun: dict[str, Started],
) -> None:
    stopped = begun["collapse"].wait(code=1)
    # A checkpoint records for how many steps the load has been too high (5), so each rollback lasts 2 steps.
    rolled_back = re.findall(
        rf"^step 7: {COLLAPSED}; rolling back, without (.*)$", stopped.stdout, re.MULTILINE
    )
    assert rolled_back == ["data steps 6 to 6", "data steps 7 to 7"]
    assert re.fullmatch(
        rf"ranks 0, 1: step 7: {COLLAPSED}; .*guard\.max_interventions=2 is used up\. Raise .*",
        stopped.reason,
    ), stopped.reason
    check_skips(stopped.run_dir, *((step, f"step 7: {COLLAPSED}") for step in (6, 7)))
    assert verify_checkpoint(stopped.checkpoint(5)).state.n_interventions == 0
