"""What is done about a step that went wrong: the config's policy for each finding of training/guard.py."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from turnout.training.config.guard import GuardConfig
from turnout.training.config.run import RunConfig
from turnout.training.errors import DivergedError
from turnout.training.guard import Finding, examine
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import name_ranks
from turnout.training.progress import Progress
from turnout.training.step import StepResult, StepTotals

Action = Literal["stop", "skip", "rollback"]
KINDS = ("non_finite", "spike", "collapse")
# fp16 lowers its loss scale after an overflow; this many in a row means that no scale helps.
MAX_OVERFLOWS_IN_A_ROW = 50


@dataclass(frozen=True)
class Intervention:
    """A finding and what the config says to do about it."""

    finding: Finding
    action: Action


class GuardPolicy:
    """Looks at each step before its update, and again after it. All ranks come to the same result."""

    def __init__(self, cfg: RunConfig, groups: Groups, progress: Progress) -> None:
        self._cfg, self._groups, self.progress = cfg, groups, progress
        self._finding: Finding | None = None

    def is_wanted(self, totals: StepTotals) -> bool:
        """Return whether the update of a step should be applied; takes note of its loss."""
        self._finding = None
        loss = float(totals.loss)
        if math.isfinite(loss):  # else the engine does not apply it anyway, and says by which norm
            counts_ME = totals.counts.view_as(self.progress.router_state.bias_ME)
            self.progress.guard, found = examine(
                self.progress.guard, self._cfg.guard, loss=loss, grad_norm=0.0, counts_ME=counts_ME
            )
            self._finding = self._agreed(found)
        return self._finding is None

    def intervention(self, result: StepResult) -> Intervention | None:
        """Return what is wrong with a step whose update was tried, and what to do.

        Raises DivergedError, on every rank, where the policy is to stop, or its limit is reached.
        """
        guard = self._cfg.guard
        if self._finding is None and not result.outcome.was_applied and not self._is_mere_overflow(result):
            _, self._finding = examine(
                self.progress.guard,
                guard,
                loss=float(result.loss),
                grad_norm=result.outcome.grad_norm,
                counts_ME=None,
            )
        if self._finding is None:
            return None
        action = _action(guard, self._finding)
        if action == "stop":
            raise DivergedError(
                f"{self._described(result)}; the update was not applied. {_way_out(self._finding)}"
            )
        assert guard.max_interventions is not None, "GuardConfig fills it in"
        if self.progress.n_interventions >= guard.max_interventions:
            raise DivergedError(
                f"{self._described(result)}; the update was not applied, and "
                f"guard.max_interventions={guard.max_interventions} is used up. {_way_out(self._finding)}"
            )
        return Intervention(self._finding, action)

    def _is_mere_overflow(self, result: StepResult) -> bool:
        """Return whether fp16's loss scale was too high, which it mends by itself."""
        return (
            self._cfg.train.precision == "fp16"
            and math.isfinite(float(result.loss))
            and self.progress.n_skipped_in_a_row < MAX_OVERFLOWS_IN_A_ROW
        )

    def _agreed(self, finding: Finding | None) -> Finding | None:
        """Return a finding if any rank has one: sums over different groups may differ in their last bit."""
        guard = self._cfg.guard
        if guard.on_spike == "off" and guard.on_collapse == "off":
            return finding
        rank_has = torch.tensor(KINDS.index(finding.kind) if finding else -1, device=self._groups.device)
        worst = int(self._groups.max_over_ranks(rank_has))
        if finding is not None or worst < 0:
            return finding
        kind: Literal["spike", "collapse"] = "spike" if KINDS[worst] == "spike" else "collapse"
        return Finding(kind, math.nan, None, f"{kind} by a hair, found on another rank")

    def _described(self, result: StepResult) -> str:
        """Put the finding in words, with the ranks whose own loss is not finite."""
        assert self._finding is not None
        local = self._groups.collect(float(result.local_nll))
        bad = [rank for rank, nll in enumerate(local) if not math.isfinite(nll)]
        return self._finding.text + (f", not finite on {name_ranks(bad)}" if bad else "")


def _action(guard: GuardConfig, finding: Finding) -> Action:
    actions = {"non_finite": guard.on_non_finite, "spike": guard.on_spike, "collapse": guard.on_collapse}
    action = actions[finding.kind]
    assert action != "off", "what is off is not examined"
    return action


def _way_out(finding: Finding) -> str:
    if finding.kind == "collapse":
        return "Raise model.balance.coef or model.balance.bias_rate, or set guard.on_collapse=rollback"
    lower = "Lower optim.lr, set train.clip_norm, look at the data of this step"
    return f"{lower}, or set guard.on_{finding.kind}=rollback"
