"""Detect anomalies of training from one step's loss, gradient norm and expert counts, over all ranks.

Pure: no ranks, no clock, no files. Every rank that examines the same values finds the same anomaly; the
caller (training/guard_policy.py) decides what to do about it. The state consists of plain numbers and is part
of each checkpoint: returning to a checkpoint restores it, so nothing here needs a reset.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

from turnout.training.config.guard import GuardConfig

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and not needed to read checkpoints


@dataclass(frozen=True)
class GuardState:
    """The guard's memory between steps. A round trip through JSON changes nothing.

    Statistics of the losses that were neither spikes nor non-finite. The newest loss has weight 1, each
    earlier one (1 - 1 / spike_window_steps) times the weight of its successor:
      n_losses       number of losses
      weight_sum     sum of their weights
      weight_sq_sum  sum of the squared weights
      mean           weighted mean
      sq_dev_sum     weighted sum of squared deviations from the mean
    For each expert layer, the number of consecutive steps above a limit (empty before the first counts):
      overloaded_steps  above max_load_frac
      dead_steps        above max_dead_frac
    """

    n_losses: int
    weight_sum: float
    weight_sq_sum: float
    mean: float
    sq_dev_sum: float
    overloaded_steps: list[int] = field(default_factory=list)
    dead_steps: list[int] = field(default_factory=list)

    @classmethod
    def initial(cls) -> Self:
        return cls(n_losses=0, weight_sum=0.0, weight_sq_sum=0.0, mean=0.0, sq_dev_sum=0.0)

    @property
    def std(self) -> float:
        """Standard deviation of the losses; defined from two losses on.

        The divisor makes the variance unbiased for these weights (Galassi et al., GNU Scientific Library
        manual, "Weighted samples").
        """
        return math.sqrt(self.sq_dev_sum / (self.weight_sum - self.weight_sq_sum / self.weight_sum))

    def after_loss(self, loss: float, window_steps: int) -> Self:
        """Return the state with one more loss.

        The update is that of West 1979 (doi 10.1145/359146.359153), with the old weights scaled down first as
        in Finch 2009, "Incremental calculation of weighted mean and variance", section 9. Dividing by the sum
        of the weights seen so far avoids a bias toward the initial zero.
        """
        decay = 1 - 1 / window_steps
        weight_sum = decay * self.weight_sum + 1
        deviation = loss - self.mean
        mean = self.mean + deviation / weight_sum
        return replace(
            self,
            n_losses=self.n_losses + 1,
            weight_sum=weight_sum,
            weight_sq_sum=decay * decay * self.weight_sq_sum + 1,
            mean=mean,
            sq_dev_sum=decay * self.sq_dev_sum + deviation * (loss - mean),
        )


@dataclass(frozen=True)
class Anomaly:
    """One way in which a step is abnormal.

    measured  non_finite: the loss or the gradient norm; spike: standard deviations above the mean;
              collapse: fraction of the rows or of the experts
    limit     the setting that measured exceeds; None for non_finite
    text      one line for the log
    """

    kind: Literal["non_finite", "spike", "collapse"]
    measured: float
    limit: float | None
    text: str


def examine(
    state: GuardState, cfg: GuardConfig, *, loss: float, grad_norm: float, counts_ME: "Tensor | None"
) -> tuple[GuardState, Anomaly | None]:
    """Return the state after a step, and the most severe anomaly of the step or None.

    loss       mean over the global batch
    grad_norm  global norm before clipping
    counts_ME  [M, E] int64, rows of the global batch that chose each expert; None: not examined

    A non-finite step leaves the state unchanged, because routers that hold NaN choose experts arbitrarily. A
    collapse is reported at every step while it lasts.
    """
    anomaly = _non_finite(loss, grad_norm)
    if anomaly is not None:
        return state, anomaly
    collapse = None
    if counts_ME is not None and cfg.on_collapse != "off":
        state, collapse = _examine_collapse(state, cfg, counts_ME)
    spike = None
    if cfg.on_spike != "off":
        state, spike = _examine_spike(state, cfg, loss)
    return state, spike or collapse


def _non_finite(loss: float, grad_norm: float) -> Anomaly | None:
    if not math.isfinite(loss):
        return Anomaly("non_finite", loss, None, f"loss is {loss}, gradient norm is {grad_norm:.4g}")
    if not math.isfinite(grad_norm):
        text = f"gradient norm is {grad_norm} though the loss is {loss:.4g}"
        return Anomaly("non_finite", grad_norm, None, text)
    return None


def _examine_spike(state: GuardState, cfg: GuardConfig, loss: float) -> tuple[GuardState, Anomaly | None]:
    assert cfg.spike_sigma is not None and cfg.spike_window_steps is not None, "GuardConfig fills these in"
    if state.n_losses >= cfg.spike_window_steps:
        excess, std = loss - state.mean, state.std
        # If all losses were equal, any larger one is infinitely many deviations above the mean.
        n_sigmas = excess / std if std > 0 else (math.inf if excess > 0 else 0.0)
        if n_sigmas > cfg.spike_sigma:
            text = (
                f"loss {loss:.4g} is {n_sigmas:.3g} standard deviations above its mean {state.mean:.4g} "
                f"(limit guard.spike_sigma={cfg.spike_sigma:g})"
            )
            return state, Anomaly("spike", n_sigmas, cfg.spike_sigma, text)
    return state.after_loss(loss, cfg.spike_window_steps), None


def _examine_collapse(
    state: GuardState, cfg: GuardConfig, counts_ME: "Tensor"
) -> tuple[GuardState, Anomaly | None]:
    patience_steps = cfg.collapse_patience_steps
    assert patience_steps is not None, "GuardConfig fills it in"
    counts_by_layer = counts_ME.tolist()
    loads_M = [max(counts) / max(1, sum(counts)) for counts in counts_by_layer]
    dead_M = [counts.count(0) / len(counts) for counts in counts_by_layer]
    overloaded_steps = _steps_above(loads_M, cfg.max_load_frac, state.overloaded_steps)
    dead_steps = _steps_above(dead_M, cfg.max_dead_frac, state.dead_steps)
    state = replace(state, overloaded_steps=overloaded_steps, dead_steps=dead_steps)
    layer = _worst_layer(loads_M, overloaded_steps, patience_steps)
    if layer is not None:
        counts = counts_by_layer[layer]
        text = (
            f"layer {layer} sends {loads_M[layer]:.3g} of its rows to expert {counts.index(max(counts))}, "
            f"above guard.max_load_frac={cfg.max_load_frac:g} for {overloaded_steps[layer]} steps"
        )
        return state, Anomaly("collapse", loads_M[layer], cfg.max_load_frac, text)
    layer = _worst_layer(dead_M, dead_steps, patience_steps)
    if layer is not None:
        text = (
            f"layer {layer} sends no row to {dead_M[layer]:.3g} of its experts, above "
            f"guard.max_dead_frac={cfg.max_dead_frac:g} for {dead_steps[layer]} steps"
        )
        return state, Anomaly("collapse", dead_M[layer], cfg.max_dead_frac, text)
    return state, None


def _steps_above(fracs_M: list[float], limit: float | None, steps_M: list[int]) -> list[int]:
    """Return for how many consecutive steps each layer's fraction has been above the limit."""
    before_M = steps_M or [0] * len(fracs_M)
    if limit is None:
        return [0] * len(fracs_M)
    return [n + 1 if x > limit else 0 for x, n in zip(fracs_M, before_M, strict=True)]


def _worst_layer(fracs_M: list[float], steps_M: list[int], patience_steps: int) -> int | None:
    """Return the layer with the largest fraction among those above their limit for long enough."""
    layers = [layer for layer, n_steps in enumerate(steps_M) if n_steps >= patience_steps]
    return max(layers, key=lambda layer: fracs_M[layer], default=None)
