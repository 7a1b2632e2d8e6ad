"""What a run does about an abnormal step: the guard's policies, and runs that roll back.

With the learning rate STILL no weight changes, so the loss of a step shows which data it has read.
"""

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.layouts import groups_of
from tests.runs import read_rows, run_config
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.data.skips import SkippedWindow, read_skips, write_skips
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.run_dir import attachments, create_run_dir
from turnout.moe.load_balancing import RouterState
from turnout.training.checkpoint.directory import checkpoint_path, read_checkpoint
from turnout.training.config.run import RunConfig
from turnout.training.engine.engine import StepOutcome
from turnout.training.errors import DivergedError
from turnout.training.guard import GuardState
from turnout.training.guard_policy import MAX_OVERFLOWS_IN_A_ROW, GuardPolicy
from turnout.training.loop import SKIPPED_FILE, Observer, train
from turnout.training.parallel.layout import Layout
from turnout.training.progress import Progress
from turnout.training.run_control import FencingToken, take_over
from turnout.training.step import StepResult, StepTotals

# Policies, on synthetic values

CALM = GuardState(n_losses=9, weight_sum=3.0, weight_sq_sum=3.0, mean=3.0, sq_dev_sum=8.0)
EVEN, OVERLOADED = (2.0,) * 6, (6.0, 2.0, 2.0, 2.0, 0.0, 0.0)
POLICIES = {"on_non_finite": "skip", "on_spike": "rollback", "on_collapse": "stop", "spike_window_steps": 5}
POLICIES |= {"max_load_frac": 0.4, "collapse_patience_steps": 1}


def policy_of(guard: dict[str, Any], *, precision: str = "fp32", **progress: int) -> GuardPolicy:
    """Return the policy for a model with one expert layer and earlier losses of mean 3 and deviation 2."""
    train = {"precision": precision, "batch_tokens": 24}
    cfg = run_config(model={"n_layers": 1}, train=train, guard=guard, checkpoint={"every_steps": 1})
    state = Progress(RouterState.initial(cfg.model), guard=CALM, **progress)
    return GuardPolicy(cfg, groups_of(Layout(1), 0), state)


def totals_of(loss: float, counts_E: tuple[float, ...] = EVEN) -> StepTotals:
    sums = torch.tensor([7 * loss, 0, 0, 0, 0, 0, *counts_E], dtype=torch.float64)
    return StepTotals(torch.tensor(7), sums, sums[0])


def result_of(totals: StepTotals, *, was_applied: bool, grad_norm: float = 1.0) -> StepResult:
    zero = torch.zeros(())
    outcome = StepOutcome(grad_norm, was_applied)
    return StepResult(totals.loss, zero, zero, zero, totals.counts, zero, zero, totals.local_nll, outcome)


def step(policy: GuardPolicy, totals: StepTotals, grad_norm: float = 1.0) -> tuple[str, str] | None:
    """Take a step as the training loop does; return the anomaly's kind and the action."""
    was_applied = policy.is_wanted(totals) and math.isfinite(grad_norm) and math.isfinite(totals.loss)
    intervention = policy.intervention(result_of(totals, was_applied=was_applied, grad_norm=grad_norm))
    assert (intervention is None) or not was_applied
    return intervention and (intervention.anomaly.kind, intervention.action)


def test_each_anomaly_has_its_own_policy(one_rank: None) -> None:
    policy = policy_of(POLICIES)
    assert step(policy, totals_of(4.0)) is None
    assert step(policy, totals_of(90.0)) == ("spike", "rollback")
    assert step(policy, totals_of(math.nan)) == ("non_finite", "skip")
    assert step(policy, totals_of(4.0), grad_norm=math.inf) == ("non_finite", "skip")
    with pytest.raises(DivergedError, match=r"layer 0 sends 0\.5 .* the update was not applied\. Raise"):
        step(policy, totals_of(4.0, OVERLOADED))


@pytest.mark.parametrize("n_made", [0, 2])
def test_interventions_are_made_up_to_the_limit(n_made: int, one_rank: None) -> None:
    limited = {**POLICIES, "max_interventions": 3}
    assert step(policy_of(limited, n_interventions=n_made), totals_of(90.0)) == ("spike", "rollback")
    with pytest.raises(DivergedError, match=r"guard\.max_interventions=3 is used up\. Lower optim\.lr"):
        step(policy_of(limited, n_interventions=3), totals_of(90.0))


@pytest.mark.parametrize(
    ("precision", "loss", "n_before", "is_intervention"),
    [
        pytest.param("fp16", 4.0, 0, False, id="first overflow of fp16"),
        pytest.param("fp16", 4.0, MAX_OVERFLOWS_IN_A_ROW - 1, False, id="as many in a row as are tolerated"),
        pytest.param("fp16", 4.0, MAX_OVERFLOWS_IN_A_ROW, True, id="one more"),
        pytest.param("fp16", math.nan, 0, True, id="loss of fp16"),
        pytest.param("bf16", 4.0, 0, True, id="bf16"),
    ],
)
def test_only_fp16_may_overflow_and_not_forever(
    precision: str, loss: float, n_before: int, is_intervention: bool, one_rank: None
) -> None:
    policy = policy_of({"on_non_finite": "skip"}, precision=precision, n_skipped_in_a_row=n_before)
    want = ("non_finite", "skip") if is_intervention else None
    assert step(policy, totals_of(loss), grad_norm=math.inf) == want


# Whole runs

STILL = 1e-30  # a learning rate at which no fp32 weight changes
# With these limits nearly even loads count as a collapse: at step 6, and again whenever step 6 is reached.
EVERY_STEP = {"max_load_frac": 0.17, "collapse_patience_steps": 6, "on_collapse": "rollback"}


@pytest.fixture(scope="module")
def corpus(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"one": make_texts(60)}, valid_frac=0.1)


def config(corpus: Corpus, guard: dict[str, Any], *, every_steps: int, **changes: Any) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 300},
        "train": {"n_steps": 12, "batch_tokens": 96, "microbatch_seqs": 4},
        "optim": {"lr": STILL, "schedule": {}},
        "data": {"corpus": str(corpus.path)},
        "guard": guard,
        "checkpoint": {"every_steps": every_steps, "keep_last": 100},
        "log": {"every_steps": 1, "trackers": ()},
        "eval": {"max_documents": 1},
    }
    return run_config(**{name: {**sections.get(name, {}), **changes.get(name, {})} for name in sections})


def run(
    cfg: RunConfig,
    run_dir: Path,
    corpus: Corpus,
    *,
    left_out: tuple[SkippedWindow, ...] = (),
    attached: dict[str, bytes] | None = None,
) -> list[str]:
    """Train in this process; return the reported events, and the error that ended the run, if any."""
    create_run_dir(run_dir, cfg, corpus, nproc=1)
    if left_out:
        write_skips(run_dir / SKIPPED_FILE, left_out)
    attempt_dir, events = make_attempt_dir(run_dir / "logs"), list[str]()
    fencing_token, groups = FencingToken(run_dir, take_over(run_dir)), groups_of(Layout(1), 0)
    fencing_token.hand_over(attempt_dir)
    observer = Observer(lambda row: None, lambda prompt, text: None, events.append, lambda status: None)
    files = attachments(run_dir, cfg)
    files = replace(files, files=files.files | (attached or {}))
    try:
        train(
            cfg,
            run_dir,
            groups,
            observer,
            fencing_token=fencing_token,
            attached=files,
            attempt_dir=attempt_dir,
        )
    except DivergedError as err:
        events.append(str(err))
    return events


def losses_of(run_dir: Path) -> list[float]:
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module")
def losses(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The loss of each data step, while no weight changes."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    run(config(corpus, {}, every_steps=100), run_dir, corpus)
    found = losses_of(run_dir)
    assert len(set(found)) == len(found) == 12, "each data step has its own loss"
    return found


def test_a_step_reads_the_data_of_its_number_without_the_windows_left_out(
    corpus: Corpus, losses: list[float], tmp_path: Path
) -> None:
    left_out = (SkippedWindow(2, 3, "a test"), SkippedWindow(5, 5, "a test"))
    cfg = config(corpus, {}, every_steps=100, train={"n_steps": 9})
    run(cfg, tmp_path / "run", corpus, left_out=left_out)
    assert losses_of(tmp_path / "run") == [losses[data_step] for data_step in (0, 1, 4, 6, 7, 8, 9, 10, 11)]


# Steps 4, 5 and 6 are repeated twice, each time with the data after the windows left out.
@pytest.mark.parametrize(
    ("n_left_out", "windows", "data_steps"),
    [
        pytest.param(1, [(5, 5), (6, 6)], [0, 1, 2, 3, 4], id="one step"),
        pytest.param(2, [(4, 5), (6, 7)], [0, 1, 2, 3, 8], id="two steps"),
        pytest.param(9, [(3, 5), (6, 8)], [0, 1, 2, 9, 10], id="no more than since the checkpoint"),
    ],
)
def test_a_rollback_leaves_out_the_data_that_led_to_it(
    n_left_out: int,
    windows: list[tuple[int, int]],
    data_steps: list[int],
    corpus: Corpus,
    losses: list[float],
    tmp_path: Path,
) -> None:
    guard = {**EVERY_STEP, "skip_window_steps": n_left_out, "max_interventions": 2}
    events = run(config(corpus, guard, every_steps=3), tmp_path / "run", corpus)
    backs = [text.split("without ")[1] for text in events if "rolling back" in text]
    assert backs == [f"data steps {first} to {last}" for first, last in windows]
    assert "guard.max_interventions=2 is used up" in events[-1]
    found = read_skips(tmp_path / "run" / SKIPPED_FILE)
    assert [(window.first, window.last) for window in found] == windows
    assert all(window.reason.startswith("step 6: layer ") for window in found)
    assert losses_of(tmp_path / "run") == [losses[data_step] for data_step in data_steps]


def test_skips_since_the_checkpoint_still_count_after_a_rollback(corpus: Corpus, tmp_path: Path) -> None:
    guard = {**EVERY_STEP, "on_spike": "skip", "spike_sigma": 0.1, "spike_window_steps": 4}
    guard["max_interventions"] = 6
    events = run(config(corpus, guard, every_steps=4), tmp_path / "run", corpus)
    n_skips, n_backs = (sum(words in text for text in events) for words in ("was skipped", "rolling back"))
    assert n_skips > 0 and n_backs > 0, events
    assert n_skips + n_backs == 6
    assert "guard.max_interventions=6 is used up" in events[-1]


def test_a_rollback_without_a_checkpoint_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    events = run(config(corpus, EVERY_STEP, every_steps=10), tmp_path / "run", corpus)
    (reason,) = events
    assert reason.startswith("step 6: layer ")
    assert "there is no checkpoint to roll back to yet; lower checkpoint.every_steps" in reason
    assert not (tmp_path / "run" / SKIPPED_FILE).exists()


def test_each_skip_is_counted_and_skips_in_a_row_until_a_step_is_applied(
    corpus: Corpus, tmp_path: Path
) -> None:
    guard = {"on_spike": "skip", "spike_sigma": 0.1, "spike_window_steps": 4, "max_interventions": 12}
    events = run(config(corpus, guard, every_steps=1), tmp_path / "run", corpus)
    skipped = {int(text.split()[1].rstrip(":")) for text in events}
    assert len({step - 1 for step in skipped} & skipped) > 0, "some steps in a row, and not all"
    assert max(skipped) - min(skipped) >= len(skipped), "some steps in a row, and not all"
    n_in_a_row = 0
    for step_done in range(1, 13):
        n_in_a_row = n_in_a_row + 1 if step_done in skipped else 0
        state = read_checkpoint(checkpoint_path(tmp_path / "run", step_done)).state
        n_skipped = sum(other <= step_done for other in skipped)
        assert (state.n_skipped, state.n_skipped_in_a_row) == (n_skipped, n_in_a_row)
        # The data of a skipped step has been read.
        assert (state.step, state.tokens_seen) == (step_done, 96 * step_done)
        assert state.n_interventions == state.n_skipped


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint of step 9."""
    paths = checkpoint_path(run_dir, 9).glob("*.safetensors")
    return {f"{path.name}:{key}": t for path in paths for key, t in load_file(path).items()}


def test_a_run_that_rolled_back_ends_like_one_without_that_data(corpus: Corpus, tmp_path: Path) -> None:
    """Undone steps leave no trace in weights, moments, router state and the guard's statistics."""
    guard = {"on_spike": "rollback", "spike_sigma": 0.4, "spike_window_steps": 5, "max_interventions": 40}
    changes = {
        "model": {"vocab_size": 300, "balance": {"scope": "batch", "coef": 0.1, "bias_rate": 0.02}},
        "train": {"n_steps": 9, "batch_tokens": 96, "microbatch_seqs": 4},
        "optim": {"lr": 3e-5, "schedule": {}},  # so low that the loss sometimes rises
    }
    cfg = config(corpus, guard, every_steps=4, **changes)
    back, straight = tmp_path / "back", tmp_path / "straight"
    events = run(cfg, back, corpus)
    left_out = read_skips(back / SKIPPED_FILE)
    assert sum("rolling back" in text for text in events) == len(left_out) > 1
    assert run(cfg, straight, corpus, left_out=left_out) == []
    assert losses_of(back) == losses_of(straight)
    got, want = tensors_of(back), tensors_of(straight)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    states = [read_checkpoint(checkpoint_path(run_dir, 9)).state for run_dir in (back, straight)]
    assert states[0] == states[1]


def test_a_run_that_the_guard_stops_waits_for_a_save_in_progress(corpus: Corpus, tmp_path: Path) -> None:
    guard = {**EVERY_STEP, "on_collapse": "stop"}
    large = {"provenance.json": b"x" * 2**25}  # so that the save takes longer than a step
    (events,) = run(config(corpus, guard, every_steps=5), tmp_path / "run", corpus, attached=large)
    assert events.startswith("layer ")
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    assert checkpoint_path(tmp_path / "run", 5).exists()
