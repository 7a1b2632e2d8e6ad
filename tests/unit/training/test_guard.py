"""Which steps the guard finds abnormal, against formulas over the whole history."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from turnout.training.config.guard import GuardConfig
from turnout.training.guard import Anomaly, GuardState, examine

ALL = {"on_spike": "stop", "on_collapse": "stop", "spike_window_steps": 10, "max_dead_frac": 0.5}


def config(**settings: Any) -> GuardConfig:
    return GuardConfig.model_validate(settings)


def run(
    cfg: GuardConfig, losses: list[float], *, grad_norm: float = 1.0, counts_ME: Tensor | None = None
) -> tuple[GuardState, list[Anomaly | None]]:
    state, anomalies = GuardState.initial(), []
    for loss in losses:
        state, anomaly = examine(state, cfg, loss=loss, grad_norm=grad_norm, counts_ME=counts_ME)
        anomalies.append(anomaly)
    return state, anomalies


def run_counts(
    cfg: GuardConfig, steps: list[list[list[int]]], state: GuardState | None = None
) -> list[str | None]:
    """Return the kind and text of each step's anomaly."""
    state, texts = state or GuardState.initial(), []
    for counts in steps:
        state, anomaly = examine(state, cfg, loss=3.0, grad_norm=1.0, counts_ME=torch.tensor(counts))
        texts.append(anomaly and f"{anomaly.kind}: {anomaly.text}")
    return texts


# Values that are not finite


@pytest.mark.parametrize(
    ("loss", "grad_norm", "text"),
    [
        (math.nan, 2.0, "loss is nan, gradient norm is 2"),
        (math.inf, math.nan, "loss is inf, gradient norm is nan"),
        (-math.inf, 2.0, "loss is -inf, gradient norm is 2"),
        (3.4123, math.inf, "gradient norm is inf though the loss is 3.412"),
        (3.4123, math.nan, "gradient norm is nan though the loss is 3.412"),
    ],
)
def test_a_non_finite_step_is_found_and_leaves_the_state_unchanged(
    loss: float, grad_norm: float, text: str
) -> None:
    before, _ = run(config(**ALL), [3.0, 4.0, 5.0], counts_ME=torch.tensor([[5, 0, 0, 0]]))
    collapsed = torch.tensor([[0, 9, 0, 0]])
    state, anomaly = examine(before, config(**ALL), loss=loss, grad_norm=grad_norm, counts_ME=collapsed)
    assert state == before
    assert anomaly is not None and (anomaly.kind, anomaly.limit, anomaly.text) == ("non_finite", None, text)
    assert anomaly.measured == pytest.approx(grad_norm if math.isfinite(loss) else loss, nan_ok=True)


def test_a_guard_with_the_default_config_finds_only_non_finite_steps() -> None:
    counts_ME = torch.tensor([[100, 0, 0, 0]])
    state, anomalies = run(GuardConfig(), [3.0] * 200 + [1e9, math.nan], grad_norm=1e9, counts_ME=counts_ME)
    assert [anomaly and anomaly.kind for anomaly in anomalies] == [None] * 201 + ["non_finite"]
    assert state == GuardState.initial()


# Spikes


def weighted_moments(losses: list[float], window_steps: int) -> tuple[float, float]:
    """Mean and unbiased standard deviation, written out over the whole history."""
    x = np.array(losses)
    w = (1 - 1 / window_steps) ** np.arange(len(x) - 1, -1, -1.0)
    mean = (w * x).sum() / w.sum()
    variance = w.sum() / (w.sum() ** 2 - (w**2).sum()) * (w * (x - mean) ** 2).sum()
    return float(mean), float(np.sqrt(variance))


@pytest.mark.parametrize(("window_steps", "sigma"), [(2, 30.0), (7, 5.0), (50, 3.0)])
def test_spikes_and_their_size_are_those_of_the_whole_history(window_steps: int, sigma: float) -> None:
    rng = np.random.default_rng(window_steps)
    losses = list(2 + 6 / (1 + np.arange(400) / 30) + 0.1 * rng.standard_normal(400))
    for step, change in {1: 5.0, 90: 9.0, 91: math.nan, 92: 9.0, 200: -9.0, 300: 1.0, 301: math.inf}.items():
        losses[step] += change
    cfg = config(on_spike="stop", spike_window_steps=window_steps, spike_sigma=sigma)
    state, history, n_spikes = GuardState.initial(), [], 0
    for loss in losses:
        state, anomaly = examine(state, cfg, loss=loss, grad_norm=1.0, counts_ME=None)
        if not math.isfinite(loss):
            assert anomaly is not None and anomaly.kind == "non_finite"
            continue
        mean, std = weighted_moments(history, window_steps) if len(history) >= 2 else (0.0, 0.0)
        if len(history) >= window_steps and (loss - mean) / std > sigma:
            n_spikes += 1
            assert anomaly is not None and (anomaly.kind, anomaly.limit) == ("spike", sigma)
            assert anomaly.measured == pytest.approx((loss - mean) / std, rel=1e-9)
        else:
            assert anomaly is None
            history.append(loss)
        assert state.n_losses == len(history)
        if len(history) >= 2:
            assert (state.mean, state.std) == pytest.approx(weighted_moments(history, window_steps), rel=1e-9)
    assert n_spikes >= 2, "without spikes this test proves nothing"


def test_weights_of_past_losses_fade_over_the_window() -> None:
    """Half of the old level is gone after about 0.69 windows."""
    state, _ = run(
        config(on_spike="stop", spike_sigma=1e9, spike_window_steps=100), [4.0] * 2000 + [2.0] * 69
    )
    assert state.mean == pytest.approx(3.0, abs=0.01)


def test_the_first_loss_is_the_mean() -> None:
    state, _ = run(config(on_spike="stop"), [7.5])
    assert state.mean == 7.5


def test_a_loss_exactly_at_the_limit_is_no_spike() -> None:
    # The variance is 8 / (3 - 3 / 3) = 4.
    state = GuardState(n_losses=10, weight_sum=3.0, weight_sq_sum=3.0, mean=3.0, sq_dev_sum=8.0)
    cfg = config(on_spike="stop", spike_window_steps=10)
    _, anomaly = examine(state, cfg, loss=15.0, grad_norm=1.0, counts_ME=None)
    assert anomaly is None
    _, anomaly = examine(state, cfg, loss=math.nextafter(15.0, 16.0), grad_norm=1.0, counts_ME=None)
    assert anomaly is not None and anomaly.kind == "spike"
    after, anomaly = examine(state, cfg, loss=21.5, grad_norm=1.0, counts_ME=None)
    want = "loss 21.5 is 9.25 standard deviations above its mean 3 (limit guard.spike_sigma=6)"
    assert anomaly == Anomaly("spike", 9.25, 6.0, want)
    assert after == state


def test_no_spike_is_found_before_the_window_is_full() -> None:
    calm = [3.0, 3.1] * 5
    cfg = config(on_spike="stop", spike_window_steps=10)
    assert run(cfg, [*calm[:9], 50.0])[1][-1] is None
    assert run(cfg, [*calm, 50.0])[1][-1] is not None
    _, anomalies = run(cfg, [*calm[:9], math.nan, 50.0])
    assert anomalies[-1] is None, "a loss that is not finite does not fill the window"


def test_a_flat_loss_has_no_spread_and_any_rise_is_a_spike() -> None:
    cfg = config(on_spike="stop", spike_window_steps=4)
    _, anomalies = run(cfg, [3.3] * 20 + [3.2999])
    assert anomalies == [None] * 21
    anomaly = run(cfg, [3.3] * 20 + [3.3001])[1][-1]
    assert anomaly is not None and anomaly.measured == math.inf


def test_a_fall_is_no_spike_and_a_lasting_rise_stays_one() -> None:
    cfg = config(on_spike="stop", spike_window_steps=10)
    _, anomalies = run(cfg, [5.0, 5.1] * 10 + [1.0])
    assert anomalies[-1] is None
    _, anomalies = run(cfg, [5.0, 5.1] * 10 + [9.0] * 30)
    assert [anomaly and anomaly.kind for anomaly in anomalies] == [None] * 20 + ["spike"] * 30


# Collapse

EVEN = [5, 5, 5, 5]


def test_an_overloaded_expert_is_found_after_patience_and_while_it_lasts() -> None:
    cfg = config(on_collapse="stop", max_load_frac=0.9, collapse_patience_steps=3)
    above, at = [1, 0, 37, 2], [18, 1, 1, 0]  # 0.925 and exactly 0.9
    found = run_counts(cfg, [[EVEN, above]] * 5 + [[EVEN, at]] + [[EVEN, above]] * 3)
    text = "collapse: layer 1 sends 0.925 of its rows to expert 2, above guard.max_load_frac=0.9 for {} steps"
    want = [None, None, text.format(3), text.format(4), text.format(5), None, None, None, text.format(3)]
    assert found == want


def test_unused_experts_are_found_after_patience_and_while_it_lasts() -> None:
    cfg = config(on_collapse="stop", max_dead_frac=0.5, collapse_patience_steps=2)
    above, at = [7, 0, 0, 0], [13, 1, 0, 0]  # 0.75 and exactly 0.5
    found = run_counts(cfg, [[above, EVEN]] * 3 + [[at, EVEN]] * 4 + [[above, EVEN]] * 2)
    text = "collapse: layer 0 sends no row to 0.75 of its experts, above guard.max_dead_frac=0.5 for {} steps"
    assert found == [None, text.format(2), text.format(3), None, None, None, None, None, text.format(2)]


@pytest.mark.parametrize("limits", [{"max_load_frac": 0.6}, {"max_dead_frac": 0.4}], ids=str)
def test_steps_are_counted_for_each_layer_separately(limits: dict[str, float]) -> None:
    cfg = config(on_collapse="stop", collapse_patience_steps=2, **limits)
    bad = [9, 0, 1, 0]
    assert run_counts(cfg, [[bad, EVEN], [EVEN, bad]] * 4) == [None] * 8
    assert [text is not None for text in run_counts(cfg, [[bad, EVEN], [bad, bad]])] == [False, True]


def test_the_worst_layer_beyond_its_patience_is_named_and_overload_comes_first() -> None:
    cfg = config(on_collapse="stop", max_load_frac=0.6, max_dead_frac=0.5, collapse_patience_steps=2)
    mild, bad, worst = [7, 1, 1, 1], [1, 8, 1, 0], [0, 0, 0, 10]
    _, text = run_counts(cfg, [[mild, bad, EVEN], [mild, bad, worst]])
    assert text is not None and "layer 1 sends 0.8 of its rows to expert 1" in text
    _, anomaly = _two_steps(cfg, torch.tensor([worst, mild, bad]))
    assert anomaly is not None and (anomaly.measured, anomaly.limit) == (1.0, 0.6)
    loads_off = config(on_collapse="stop", max_dead_frac=0.5, collapse_patience_steps=2)
    _, anomaly = _two_steps(loads_off, torch.tensor([worst, mild, bad]))
    assert anomaly is not None and (anomaly.measured, anomaly.limit) == (0.75, 0.5)


def _two_steps(cfg: GuardConfig, counts_ME: Tensor) -> tuple[GuardState, Anomaly | None]:
    state, anomalies = run(cfg, [3.0, 3.0], counts_ME=counts_ME)
    return state, anomalies[-1]


def test_steps_without_counts_neither_extend_nor_end_a_collapse() -> None:
    cfg = config(on_collapse="stop", max_load_frac=0.6, collapse_patience_steps=2)
    bad = torch.tensor([[9, 1]])
    state, _ = examine(GuardState.initial(), cfg, loss=3.0, grad_norm=1.0, counts_ME=bad)
    for _ in range(3):
        state, anomaly = examine(state, cfg, loss=3.0, grad_norm=1.0, counts_ME=None)
        assert anomaly is None
    _, anomaly = examine(state, cfg, loss=3.0, grad_norm=1.0, counts_ME=bad)
    assert anomaly is not None and anomaly.text.endswith("for 2 steps")


# All together


def test_the_most_severe_anomaly_is_returned_and_the_others_are_still_counted() -> None:
    cfg = config(**ALL, collapse_patience_steps=12)
    collapsed = torch.tensor([[9, 0, 0, 0]])
    losses = [3.0, 3.1] * 5 + [50.0, math.nan, 50.0, 3.0]
    _, anomalies = run(cfg, losses, counts_ME=collapsed)
    kinds = [anomaly and anomaly.kind for anomaly in anomalies]
    # The counts of steps 11 and 13 are used, those of the non-finite step 12 are not: the last is the 13th.
    assert kinds == [None] * 10 + ["spike", "non_finite", "spike", "collapse"]
    assert anomalies[-1] is not None and anomalies[-1].text.endswith("for 13 steps")


def test_state_survives_json_and_is_never_changed_in_place() -> None:
    cfg = config(**ALL, max_load_frac=0.3, collapse_patience_steps=4)
    rng = np.random.default_rng(5)
    losses = (3 + 0.3 * rng.standard_normal(60)).tolist()
    losses[40] = 9.0
    counts = [torch.from_numpy(rng.integers(0, 3, (3, 4))) for _ in losses]
    state, restored, kinds = GuardState.initial(), GuardState.initial(), set()
    for loss, counts_ME in zip(losses, counts, strict=True):
        before = json.dumps(asdict(state))
        after, anomaly = examine(state, cfg, loss=loss, grad_norm=1.0, counts_ME=counts_ME)
        assert json.dumps(asdict(state)) == before
        restored, again = examine(restored, cfg, loss=loss, grad_norm=1.0, counts_ME=counts_ME)
        restored = GuardState(**json.loads(json.dumps(asdict(restored), allow_nan=False)))
        assert (restored, again) == (after, anomaly)
        state = after
        kinds.add(anomaly and anomaly.kind)
    assert kinds == {None, "spike", "collapse"}, "without anomalies this test proves little"
