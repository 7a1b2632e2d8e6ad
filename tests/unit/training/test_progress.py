"""The progress of a run is saved in a checkpoint completely, and restored completely."""

from dataclasses import fields

import torch

from turnout.data.skips import SkippedWindow
from turnout.moe.load_balancing import RouterState
from turnout.training.guard import GuardState
from turnout.training.progress import Progress

ROUTER = RouterState(torch.ones(1, 2), torch.ones(1, 2))
GUARD = GuardState(n_losses=3, weight_sum=2.5, weight_sq_sum=2.25, mean=4.5, sq_dev_sum=0.5)


def test_every_field_is_restored() -> None:
    counts = {"step": 11, "tokens_seen": 5000, "n_skipped": 5, "n_skipped_in_a_row": 2, "n_interventions": 3}
    before = Progress(ROUTER, **counts, guard=GUARD, skipped=(SkippedWindow(4, 6, "a spike"),))
    changed = {field.name for field in fields(Progress)} - {"router_state"}
    fresh = Progress(ROUTER)
    assert all(getattr(before, name) != getattr(fresh, name) for name in changed), "each field is its own"
    state = before.to_state(optimizer={"step": 4.0}, loss_scaler={"cur_scale": 8.0})
    assert state.optimizer == {"step": 4.0} and state.loss_scaler == {"cur_scale": 8.0}
    after = Progress.restored(ROUTER, state, ())
    wrong = [name for name in changed if getattr(after, name) != getattr(before, name)]
    assert wrong == []


def test_windows_of_the_run_and_of_the_checkpoint_are_left_out() -> None:
    mine, theirs = SkippedWindow(4, 6, "a spike"), SkippedWindow(9, 9, "not finite")
    state = Progress(ROUTER, skipped=(mine,)).to_state(optimizer={}, loss_scaler={})
    restored = Progress.restored(ROUTER, state, (theirs,))
    assert restored.skipped == (mine, theirs)
    assert restored.n_interventions == 2
