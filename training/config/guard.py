"""The section [guard]: what counts as training gone wrong, and what the run does then (training/guard.py)."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from turnout.moe.config import STRICT

# Defaults of settings that are active but not given. Inactive ones stay None.
GUARD_DEFAULTS: dict[str, float] = {
    "spike_sigma": 6.0,
    "spike_window_steps": 100,
    "collapse_patience_steps": 50,
    "skip_window_steps": 1,
    "max_interventions": 5,
}


class GuardConfig(BaseModel):
    """Which anomalies are looked for (training/guard.py), and what is done about each.

    stop: the run ends with an error. skip: the step's update is not applied. rollback: the run returns to its
    last checkpoint and leaves out the data of the steps that led here. off: not looked for.
    Inactive settings are None. Active ones are always set, except that on_collapse needs only one of
    max_load_frac and max_dead_frac.
    """

    model_config = STRICT

    # Action when the loss or the gradient norm is not finite.
    on_non_finite: Literal["stop", "skip", "rollback"] = "stop"
    # Action when the loss is more than spike_sigma standard deviations above its running mean.
    on_spike: Literal["off", "stop", "skip", "rollback"] = "off"
    # Standard deviations above the mean beyond which a loss is a spike. Default with on_spike: 6.
    spike_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    # Window of the running mean and deviation, in steps; spikes are looked for only after so many steps.
    # Default with on_spike: 100.
    spike_window_steps: int | None = Field(default=None, ge=2)
    # Action when routing has collapsed onto few experts. There is no skip: the updates that caused the
    # collapse are already applied.
    on_collapse: Literal["off", "stop", "rollback"] = "off"
    # Fraction of a layer's rows above which one expert is overloaded. None: not examined.
    max_load_frac: float | None = Field(default=None, gt=0, lt=1)
    # Fraction of a layer's experts without any row above which the layer has collapsed. None: not examined.
    max_dead_frac: float | None = Field(default=None, ge=0, lt=1)
    # Steps in a row that a layer must exceed its limit to count as collapsed. Default with on_collapse: 50.
    collapse_patience_steps: PositiveInt | None = None
    # Steps of data that a rollback leaves out, up to and with the offending step. Default with rollback: 1.
    skip_window_steps: PositiveInt | None = None
    # Cap on the skips and rollbacks of a run; the run stops at the next one. Default with either: 5.
    max_interventions: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Fill in the defaults of active settings, so that the resolved config contains them."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        idle = _idle_guard_settings(
            *(given.get(f"on_{kind}") for kind in ("non_finite", "spike", "collapse"))
        )
        return {name: value for name, value in GUARD_DEFAULTS.items() if name not in idle} | given

    @model_validator(mode="after")
    def _check_effect(self) -> Self:
        idle = _idle_guard_settings(self.on_non_finite, self.on_spike, self.on_collapse)
        for name, remedy in idle.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)} has no effect {remedy}, or drop it")
        if self.on_collapse != "off" and self.max_load_frac is None and self.max_dead_frac is None:
            raise ValueError(
                f"on_collapse={self.on_collapse} needs max_load_frac, max_dead_frac or both; "
                "max_dead_frac=0.5 finds a layer that uses less than half of its experts"
            )
        return self


def _idle_guard_settings(on_non_finite: Any, on_spike: Any, on_collapse: Any) -> dict[str, str]:
    """Return the settings that have no effect with these actions, each with the reason and the way out."""
    actions = (on_non_finite, on_spike, on_collapse)
    idle: dict[str, str] = {}
    if on_spike in (None, "off"):
        spike = ("spike_sigma", "spike_window_steps")
        idle |= dict.fromkeys(spike, "with on_spike=off; set on_spike to stop, skip or rollback")
    if on_collapse in (None, "off"):
        collapse = ("max_load_frac", "max_dead_frac", "collapse_patience_steps")
        idle |= dict.fromkeys(collapse, "with on_collapse=off; set on_collapse to stop or rollback")
    if "rollback" not in actions:
        idle["skip_window_steps"] = (
            "without a rollback; set on_non_finite, on_spike or on_collapse to rollback"
        )
        if "skip" not in actions:
            idle["max_interventions"] = (
                "when nothing is skipped or rolled back; set on_spike=skip for example"
            )
    return idle
