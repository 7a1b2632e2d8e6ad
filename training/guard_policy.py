"""What a run does about a step that went wrong: the config's action for each anomaly of training/guard.py."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from turnout.training.config.guard import GuardConfig
from turnout.training.config.run import RunConfig
from turnout.training.errors import DivergedError
from turnout.training.guard import Anomaly, examine
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import name_ranks
from turnout.training.progress import Progress
from turnout.training.step import StepResult, StepTotals

Action = Literal["stop", "skip", "rollback"]
KINDS = ("non_finite", "spike", "collapse")
# fp16 lowers its loss scale after an overflow; if this many in a row do not help, no scale does.
MAX_OVERFLOWS_IN_A_ROW = 50


@dataclass(frozen=True)
class Intervention:
    """An anomaly and the action that the config demands."""

    anomaly: Anomaly
    action: Action


class GuardPolicy:
    """Examines each step before its update, and again after it. All ranks reach the same decision."""

    def __init__(self, cfg: RunConfig, groups: Groups, progress: Progress) -> None:
        self._cfg, self._groups, self.progress = cfg, groups, progress
        self._anomaly: Anomaly | None = None

    def is_wanted(self, totals: StepTotals) -> bool:
        """Return whether the update of a step should be applied, and add its loss to the statistics."""
        self._anomaly = None
        loss = float(totals.loss)
        if math.isfinite(loss):  # otherwise the engine does not apply it anyway, and reports the norm
            counts_ME = totals.counts.view_as(self.progress.router_state.bias_ME)
            self.progress.guard, anomaly = examine(
                self.progress.guard, self._cfg.guard, loss=loss, grad_norm=0.0, counts_ME=counts_ME
            )
            self._anomaly = self._agree(anomaly)
        return self._anomaly is None

    def intervention(self, result: StepResult) -> Intervention | None:
        """Return the anomaly of a step, found before its update or in it and the action to take, or None.

        Raises DivergedError on every rank if the action is to stop, or guard.max_interventions is reached.
        """
        guard = self._cfg.guard
        if self._anomaly is None and not result.outcome.was_applied and not self._is_mere_overflow(result):
            _, self._anomaly = examine(
                self.progress.guard,
                guard,
                loss=float(result.loss),
                grad_norm=result.outcome.grad_norm,
                counts_ME=None,
            )
        if self._anomaly is None:
            return None
        action = _action(guard, self._anomaly)
        if action == "stop":
            raise DivergedError(
                f"{self._describe(result)}; the update was not applied. {_way_out(self._anomaly)}"
            )
        assert guard.max_interventions is not None, "GuardConfig fills it in"
        if self.progress.n_interventions >= guard.max_interventions:
            raise DivergedError(
                f"{self._describe(result)}; the update was not applied, and "
                f"guard.max_interventions={guard.max_interventions} is used up. {_way_out(self._anomaly)}"
            )
        return Intervention(self._anomaly, action)

    def _is_mere_overflow(self, result: StepResult) -> bool:
        """Return whether only fp16's loss scale was too high, which dynamic scaling corrects by itself."""
        return (
            self._cfg.train.precision == "fp16"
            and math.isfinite(float(result.loss))
            and self.progress.n_skipped_in_a_row < MAX_OVERFLOWS_IN_A_ROW
        )

    def _agree(self, anomaly: Anomaly | None) -> Anomaly | None:
        """Return an anomaly if any rank has one: sums over different groups may differ in their last bit."""
        guard = self._cfg.guard
        if guard.on_spike == "off" and guard.on_collapse == "off":
            return anomaly
        rank_has = torch.tensor(KINDS.index(anomaly.kind) if anomaly else -1, device=self._groups.device)
        worst = int(self._groups.max_over_ranks(rank_has))
        if anomaly is not None or worst < 0:
            return anomaly
        kind: Literal["spike", "collapse"] = "spike" if KINDS[worst] == "spike" else "collapse"
        return Anomaly(kind, math.nan, None, f"{kind} so close to its limit that only other ranks found it")

    def _describe(self, result: StepResult) -> str:
        """Return the anomaly's text, with the ranks whose own loss is not finite."""
        assert self._anomaly is not None
        local = self._groups.collect(float(result.local_nll))
        bad = [rank for rank, nll in enumerate(local) if not math.isfinite(nll)]
        return self._anomaly.text + (f", not finite on {name_ranks(bad)}" if bad else "")


def _action(guard: GuardConfig, anomaly: Anomaly) -> Action:
    actions = {"non_finite": guard.on_non_finite, "spike": guard.on_spike, "collapse": guard.on_collapse}
    action = actions[anomaly.kind]
    assert action != "off", "anomalies that are off are not examined"
    return action


def _way_out(anomaly: Anomaly) -> str:
    if anomaly.kind == "collapse":
        return "Raise model.balance.coef or model.balance.bias_rate, or set guard.on_collapse=rollback"
    lower = "Lower optim.lr, set train.clip_norm, look at the data of this step"
    return f"{lower}, or set guard.on_{anomaly.kind}=rollback"
