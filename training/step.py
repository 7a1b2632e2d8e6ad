"""One optimizer step. The only place where anything is divided by a number of tokens.

Ranks and micro-batches hold different numbers of unmasked tokens, so a mean of their means is biased. Every
loss is therefore a sum, divided once by the token count of the global batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.data.loader import IGNORE_INDEX, Batch
from turnout.moe.config import BalanceConfig
from turnout.moe.load_balancing import RouterState
from turnout.training.batches import to_device
from turnout.training.engine.engine import Engine, StepOutcome
from turnout.training.objective import ObjectiveSums
from turnout.training.parallel.groups import Groups


@dataclass(frozen=True)
class StepResult:
    """Token-weighted means over the global batch; tensors stay on the device until they are logged.

    loss           [] nats per token, without the balancing terms
    balance_loss   [] mean over expert layers, without its coefficient; 1.0 when uniform
    z_loss         [] mean over expert layers, without its coefficient
    entropy        [] nats, of the router probabilities, mean over expert layers
    counts_ME      [M, E] int64, rows that chose each expert
    n_dropped      [] int64, rows dropped by the capacity factor, all layers
    n_extra_chunks [] int64, see RouterStats; all layers and data-parallel ranks
    local_nll      [] fp64 nats, this rank's part of the summed cross-entropy
    """

    loss: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    counts_ME: Tensor
    n_dropped: Tensor
    n_extra_chunks: Tensor
    local_nll: Tensor
    outcome: StepOutcome


@dataclass(frozen=True)
class StepTotals:
    """Sums from the forward and backward passes of a step.

    n_tokens   [] int64, unmasked targets of the global batch
    sums       [6 + M * E] fp64 over the global batch, as _pack lays them out
    local_nll  [] fp64 nats, this rank's part of the summed cross-entropy
    """

    n_tokens: Tensor
    sums: Tensor
    local_nll: Tensor

    @property
    def loss(self) -> Tensor:
        """[] nats per token, over the global batch, without the balancing terms."""
        return self.sums[0] / self.n_tokens

    @property
    def counts(self) -> Tensor:
        """[M * E] int64, rows of the global batch that chose each expert."""
        return self.sums[_N_SCALARS:].long()


def accumulate(
    engine: Engine, microbatches: Sequence[Batch], router_state: RouterState, *, step: int, groups: Groups
) -> StepTotals:
    """Run forward and backward over this rank's micro-batches, and leave the gradient in the engine."""
    assert len(microbatches) == engine.n_microbatches
    n_tokens = sum((mb.targets != IGNORE_INDEX).sum() for mb in microbatches)
    assert isinstance(n_tokens, Tensor)
    n_tokens = groups.sum_over_tokens(n_tokens.to(groups.device))
    sums: Tensor | None = None
    for i, microbatch in enumerate(microbatches):
        groups.recorder.enter_phase(step, "forward")
        objective: ObjectiveSums = engine.forward(to_device(microbatch, groups.device), router_state)
        groups.recorder.enter_phase(step, "backward")
        engine.backward(objective.total / n_tokens)
        packed = _pack(objective)
        sums = packed if sums is None else sums + packed
        if i + 1 < len(microbatches):
            engine.finish_microbatch()
    assert sums is not None
    local_nll = sums[0].clone()
    return StepTotals(n_tokens, groups.sum_over_tokens(sums), local_nll)


def apply_update(engine: Engine, totals: StepTotals, router_state: RouterState, *, lr: float) -> StepResult:
    """Clip and apply the gradient that `accumulate` computed."""
    return _unpack(totals, router_state, engine.step(lr))


def train_step(
    engine: Engine,
    microbatches: Sequence[Batch],
    router_state: RouterState,
    *,
    step: int,
    lr: float,
    groups: Groups,
    is_wanted: Callable[[StepTotals], bool] | None = None,
) -> StepResult:
    """Take one optimizer step on the global batch; `microbatches` is this rank's part.

    step counts from 1 and is only for the flight recorder. is_wanted sees the totals before the update and
    must return the same on every rank. If it returns False, or the gradient norm is not finite, no weight
    changes, and the outcome's was_applied is False.
    """
    totals = accumulate(engine, microbatches, router_state, step=step, groups=groups)
    if is_wanted is not None and not is_wanted(totals):
        engine.drop_step()
    groups.recorder.enter_phase(step, "optimizer step")
    return apply_update(engine, totals, router_state, lr=lr)


def advance_router_state(state: RouterState, result: StepResult, balance: BalanceConfig) -> RouterState:
    """Return the router state after a step; a step that was not applied leaves it unchanged."""
    return state.after_step(result.counts_ME, balance) if result.outcome.was_applied else state


_N_SCALARS = 6


def _pack(objective: ObjectiveSums) -> Tensor:
    """Put all sums of a micro-batch into one fp64 row, so that they need only one reduction."""
    stats = objective.stats
    scalars = [objective.nll, stats.balance_sum.mean(), stats.z_sum.mean(), stats.entropy_sum.mean()]
    scalars += [stats.n_dropped.sum(), stats.n_extra_chunks.sum()]
    row = torch.stack([x.detach().double() for x in scalars])
    return torch.cat([row, stats.counts_E.flatten().double()])  # counts stay exact in fp64 up to 2**53


def _unpack(totals: StepTotals, state: RouterState, outcome: StepOutcome) -> StepResult:
    _, balance, z, entropy, n_dropped, n_extra_chunks = totals.sums[:_N_SCALARS]
    return StepResult(
        loss=totals.loss,
        balance_loss=balance / totals.n_tokens,
        z_loss=z / totals.n_tokens,
        entropy=entropy / totals.n_tokens,
        counts_ME=totals.counts.view_as(state.bias_ME),
        n_dropped=n_dropped.long(),
        n_extra_chunks=n_extra_chunks.long(),
        local_nll=totals.local_nll,
        outcome=outcome,
    )
