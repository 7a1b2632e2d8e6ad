"""Whether training has gone wrong, judged from one step's global numbers.

Pure: no ranks, no clock, no files. Every rank that examines the same numbers comes to the same finding; what
is then done is decided by its caller. The state is plain numbers, for the checkpoint: whoever goes back to a
checkpoint goes back to its state too, so nothing here needs a reset.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

from turnout.training.config.guard import GuardConfig

if TYPE_CHECKING:
    from torch import Tensor  # which readers of checkpoints need not wait for


@dataclass(frozen=True)
class GuardState:
    """What is remembered between steps; JSON gives back the very same.

    The losses of steps without a finding of their own, the newest with weight 1 and each step before it with
    (1 - 1 / spike_window_steps) times the weight of the next:
      n_losses       how many
      weight_sum     of their weights
      weight_sq_sum  of the squares of their weights
      mean           weighted
      sq_dev_sum     weighted sum of squared deviations from the mean
    For each expert layer (empty before the first counts), for how many steps in a row it was above the limit:
      overloaded_steps  max_load_frac
      dead_steps        max_dead_frac
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
        """Standard deviation of the losses; needs two of them.

        The divisor makes the variance unbiased for such weights (Galassi et al., GNU Scientific Library
        manual, "Weighted samples").
        """
        return math.sqrt(self.sq_dev_sum / (self.weight_sum - self.weight_sq_sum / self.weight_sum))

    def after_loss(self, loss: float, window_steps: int) -> Self:
        """Return the state with one more loss (West 1979, doi 10.1145/359146.359153, with the old weights
        scaled down first, as in Finch 2009, "Incremental calculation of weighted mean and variance", section
        9). Dividing by the weights seen so far leaves no bias toward the initial zero.
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
class Finding:
    """One thing that has gone wrong.

    measured  what was found: the loss or the gradient norm; standard deviations above the mean; a share
    limit     of the config, which measured is above; None of non_finite, which has none
    text      one line for the log
    """

    kind: Literal["non_finite", "spike", "collapse"]
    measured: float
    limit: float | None
    text: str


def examine(
    state: GuardState, cfg: GuardConfig, *, loss: float, grad_norm: float, counts_ME: "Tensor | None"
) -> tuple[GuardState, Finding | None]:
    """Return the state after a step and the worst that is wrong with the step, if anything is.

    loss       mean over the global batch
    grad_norm  global, before clipping
    counts_ME  [M, E] int64, rows of the global batch that chose each expert; None: not examined

    A step that is not finite leaves the state as it was: routers that hold NaN choose experts by accident. A
    collapse is found anew at each step for as long as it lasts.
    """
    found = _non_finite(loss, grad_norm)
    if found is not None:
        return state, found
    collapse = None
    if counts_ME is not None and cfg.on_collapse != "off":
        state, collapse = _examine_collapse(state, cfg, counts_ME)
    spike = None
    if cfg.on_spike != "off":
        state, spike = _examine_spike(state, cfg, loss)
    return state, spike or collapse


def _non_finite(loss: float, grad_norm: float) -> Finding | None:
    if not math.isfinite(loss):
        return Finding("non_finite", loss, None, f"loss is {loss}, gradient norm is {grad_norm:.4g}")
    if not math.isfinite(grad_norm):
        text = f"gradient norm is {grad_norm} though the loss is {loss:.4g}"
        return Finding("non_finite", grad_norm, None, text)
    return None


def _examine_spike(state: GuardState, cfg: GuardConfig, loss: float) -> tuple[GuardState, Finding | None]:
    assert cfg.spike_sigma is not None and cfg.spike_window_steps is not None, "GuardConfig fills these in"
    if state.n_losses >= cfg.spike_window_steps:
        excess, std = loss - state.mean, state.std
        # Without any spread, every loss above the mean is infinitely many deviations above it.
        n_sigmas = excess / std if std > 0 else (math.inf if excess > 0 else 0.0)
        if n_sigmas > cfg.spike_sigma:
            text = (
                f"loss {loss:.4g} is {n_sigmas:.3g} standard deviations above its mean {state.mean:.4g} "
                f"(limit guard.spike_sigma={cfg.spike_sigma:g})"
            )
            return state, Finding("spike", n_sigmas, cfg.spike_sigma, text)
    return state.after_loss(loss, cfg.spike_window_steps), None


def _examine_collapse(
    state: GuardState, cfg: GuardConfig, counts_ME: "Tensor"
) -> tuple[GuardState, Finding | None]:
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
        return state, Finding("collapse", loads_M[layer], cfg.max_load_frac, text)
    layer = _worst_layer(dead_M, dead_steps, patience_steps)
    if layer is not None:
        text = (
            f"layer {layer} sends no row to {dead_M[layer]:.3g} of its experts, above "
            f"guard.max_dead_frac={cfg.max_dead_frac:g} for {dead_steps[layer]} steps"
        )
        return state, Finding("collapse", dead_M[layer], cfg.max_dead_frac, text)
    return state, None


def _steps_above(shares_M: list[float], limit: float | None, steps_M: list[int]) -> list[int]:
    """Return for how many steps in a row each layer's share has been above the limit."""
    before_M = steps_M or [0] * len(shares_M)
    if limit is None:
        return [0] * len(shares_M)
    return [n + 1 if x > limit else 0 for x, n in zip(shares_M, before_M, strict=True)]


def _worst_layer(shares_M: list[float], steps_M: list[int], patience_steps: int) -> int | None:
    """Return the layer of the largest share of those above their limit for long enough."""
    layers = [layer for layer, n_steps in enumerate(steps_M) if n_steps >= patience_steps]
    return max(layers, key=lambda layer: shares_M[layer], default=None)
