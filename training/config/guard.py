"""The section [guard]: what counts as training gone wrong, and what the run does then (training/guard.py)."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from turnout.moe.config import STRICT

# What these settings of GuardConfig are where they are at work and were not given.
GUARD_DEFAULTS: dict[str, float] = {
    "spike_sigma": 6.0,
    "spike_window_steps": 100,
    "collapse_patience_steps": 50,
    "skip_window_steps": 1,
    "max_interventions": 5,
}


class GuardConfig(BaseModel):
    """What is taken for training gone wrong (training/guard.py), and what is then done.

    skip: the step's update is not applied. rollback: back to the last checkpoint, and the data of the steps
    that led here is left out. A setting that is not at work is None; one that is at work never is, but for
    max_load_frac and max_dead_frac, of which one is enough.
    """

    model_config = STRICT

    on_non_finite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["off", "stop", "skip", "rollback"] = "off"
    spike_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # standard deviations
    spike_window_steps: int | None = Field(default=None, ge=2)  # of the mean; none is found before so many
    # The updates that led to a collapse are past, so that skipping one would mend nothing.
    on_collapse: Literal["off", "stop", "rollback"] = "off"
    max_load_frac: float | None = Field(default=None, gt=0, lt=1)  # of a layer's rows, to one expert
    max_dead_frac: float | None = Field(default=None, ge=0, lt=1)  # of a layer's experts, without any row
    collapse_patience_steps: PositiveInt | None = None
    skip_window_steps: PositiveInt | None = None  # data left out by a rollback, the offending step the last
    max_interventions: PositiveInt | None = None  # skips and rollbacks of a run; at the next it stops

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Give what is at work its default here, so that the resolved config holds it."""
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
    """Return the settings that these actions leave without effect, each with why and the way out."""
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
                "where nothing is skipped or rolled back; set on_spike=skip for example"
            )
    return idle
