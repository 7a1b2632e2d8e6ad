"""The same steps in any layout of the real engine, and in plain torch in one process, for comparison by name.

A training produces evidence: named tensors for each check of training/doctor/compare.py. Nothing here knows
how layouts were chosen or how ranks were launched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.data.loader import IGNORE_INDEX, Batch, Loader
from turnout.moe.init_weights import init_weights
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import build_decoder
from turnout.training.batches import prefetch
from turnout.training.config.run import RunConfig
from turnout.training.doctor.compare import CHECKS, Evidence, compare_check
from turnout.training.doctor.synthetic_batches import Order, SyntheticLoader
from turnout.training.engine.build import build_local_decoder, put_under_engine
from turnout.training.objective import Objective, ObjectiveSums
from turnout.training.optimizers.adamw import ParamGroups, param_groups
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout
from turnout.training.step import accumulate, advance_router_state, apply_update

# Changing all weights by 1e-5 of their size, 100 times the rounding error, must not change any row's experts.
NUDGE = 1e-5
NUDGED_LIMITS = {
    "balancing gradient": 3e-3,
    "loss": 1e-4,
    "gradient": 3e-3,
    "router state": 1e-6,
    "second step": 1e-4,
}
N_SEEDS = 50


class SwitchedObjective(Objective):
    """An objective whose cross-entropy can be switched off, so that only balancing has a gradient."""

    has_cross_entropy = True

    def forward(self, batch: Batch, router_state: RouterState) -> ObjectiveSums:
        """Compute the sums of Objective, without the cross-entropy in total if it is switched off."""
        sums = super().forward(batch, router_state)
        if self.has_cross_entropy:
            return sums
        balance, stats = self.decoder.cfg.balance, sums.stats
        total = balance.coef * stats.balance_sum.mean() + balance.z_coef * stats.z_sum.mean()
        # Multiplied by 0 instead of left out, because the engine needs a gradient for every parameter.
        return ObjectiveSums(total + 0.0 * sums.total, sums.nll, stats)


def build_sgd(groups: ParamGroups) -> torch.optim.Optimizer:
    """Build plain SGD with the groups' weight decay. Adam would hide a wrong factor on a gradient."""
    return torch.optim.SGD(groups, lr=0.0)  # lr_at sets it


def lr_at(cfg: RunConfig, step: int) -> float:
    """Return 0 for the balancing-only step, then a rate that clearly changes weights without divergence."""
    if step == 0:
        return 0.0
    return 0.2 if cfg.train.clip_norm is None else 0.5 / cfg.train.clip_norm


def uneven_router_state(cfg: RunConfig) -> RouterState:
    """Return a router state with uneven loads, and with some bias if cfg has a bias_rate.

    Without uneven loads of a previous step, balancing in batch scope would have no gradient.
    """
    state, generator = RouterState.initial(cfg.model), torch.Generator().manual_seed(0)
    load_ME = torch.rand(state.load_frac_ME.shape, generator=generator) + 0.1
    steps_ME = torch.randint(-3, 4, state.bias_ME.shape, generator=generator)
    return RouterState(cfg.model.balance.bias_rate * steps_ME, load_ME / load_ME.sum(-1, keepdim=True))


def train_by_engine(cfg: RunConfig, groups: Groups, loader: Loader) -> Evidence:
    """Take cfg's steps in its layout with the real engine: a balancing-only step that changes no weight, then
    two updates. Collective; each rank returns whole tensors as it sees them.
    """
    objective = SwitchedObjective(build_local_decoder(cfg, groups))
    # The engine's own check would stop the run, whereas the comparison shows more.
    engine = put_under_engine(objective, cfg, groups, build_sgd, checks_first_step=False)
    evidence: Evidence = {check: {} for check in CHECKS}
    evidence["sample ids"] = assembled_ids(cfg, groups.layout, loader)
    state, before = uneven_router_state(cfg), engine.master_weights()
    with prefetch(loader, cfg, groups.layout, groups.rank) as steps:
        for step, microbatches in steps:
            objective.has_cross_entropy = step > 0
            totals = accumulate(engine, microbatches, state, step=step, groups=groups)
            if step < 2:
                evidence["gradient" if step else "balancing gradient"] = engine.gradients()
            result = apply_update(engine, totals, state, lr=lr_at(cfg, step))
            if step == 0:
                continue
            state = advance_router_state(state, result, cfg.model.balance)
            means = (result.loss, result.balance_loss, result.z_loss, result.entropy, result.n_dropped)
            _add_step(evidence, step, means, result.outcome.grad_norm, state)
            after = engine.master_weights()
            update = {name: after[name] - before[name] for name in before}
            evidence["first update" if step == 1 else "both updates"] = update
    engine.close()
    return evidence


def train_plainly(cfg: RunConfig, loader: Loader, *, nudge: float = 0.0) -> Evidence:
    """Take the same steps in plain torch in fp32: one process, one batch, and the reference expert backend.

    nudge: relative size of a random change of the initial weights, which shows what depends on rounding.
    """
    decoder = build_decoder(cfg.model, expert_backend="reference")
    init_weights(decoder, seed=cfg.train.seed)
    objective = SwitchedObjective(decoder)
    generator = torch.Generator().manual_seed(0)
    for parameter in objective.parameters():
        parameter.data *= 1 + nudge * torch.randn(parameter.shape, generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    optimizer = build_sgd(param_groups(objective.named_parameters(), cfg.optim.weight_decay))
    evidence: Evidence = {check: {} for check in CHECKS}
    state = uneven_router_state(cfg)
    for step in range(cfg.train.n_steps):
        batch = loader.batch(step)
        evidence["sample ids"][f"samples of step {step}"] = batch.sample_ids
        n_tokens = (batch.targets != IGNORE_INDEX).sum()
        objective.has_cross_entropy = step > 0
        sums = objective(batch, state)
        optimizer.zero_grad()
        (sums.total / n_tokens).backward()
        if step < 2:
            evidence["gradient" if step else "balancing gradient"] = _gradients(objective)
        if step == 0:
            continue
        limit = float("inf") if cfg.train.clip_norm is None else cfg.train.clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(objective.parameters(), limit))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, step)
        optimizer.step()
        state = state.after_step(sums.stats.counts_E, cfg.model.balance)
        layer_sums = (sums.stats.balance_sum, sums.stats.z_sum, sums.stats.entropy_sum)
        means = [sums.nll / n_tokens, *(x.detach().double().mean() / n_tokens for x in layer_sums)]
        _add_step(evidence, step, [*means, sums.stats.n_dropped.sum()], norm, state)
        update = {name: p.detach() - before[name] for name, p in objective.named_parameters()}
        evidence["first update" if step == 1 else "both updates"] = update
    return evidence


def _gradients(objective: Objective) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, f"no gradient reached {name}"
        gradients[name] = parameter.grad.clone()
    return gradients


def _add_step(
    evidence: Evidence, step: int, means: Sequence[Tensor], norm: float, state: RouterState
) -> None:
    """Add the losses and norm of one step, and the router state after it, to the evidence."""
    names = ("cross-entropy", "balancing loss", "z-loss", "router entropy", "dropped rows")
    loss = {name: mean.detach().double() for name, mean in zip(names, means, strict=True)}
    clip_norm = {"gradient norm": torch.tensor(norm, dtype=torch.float64)}
    router_state = {"bias": state.bias_ME, "load": state.load_frac_ME}
    if step == 1:
        evidence |= {"loss": loss, "clip norm": clip_norm, "router state": router_state}
    else:
        evidence["second step"] = loss | clip_norm | router_state


def assembled_ids(cfg: RunConfig, layout: Layout, loader: Loader) -> dict[str, Tensor]:
    """Return the sample ids that the ranks of a layout read in each step, [tp, batch_seqs].

    Row t holds those of the ranks with tp_rank t; each row must be the whole batch.
    """
    ids_of_rank: list[list[Tensor]] = []
    for rank in range(layout.world_size):
        with prefetch(loader, cfg, layout, rank) as steps:
            ids_of_rank.append(
                [torch.cat([mb.sample_ids for mb in microbatches]) for _, microbatches in steps]
            )
    return {
        f"samples of step {step}": torch.stack(
            [torch.cat([ids_of_rank[rank][step] for rank in ranks]) for ranks in layout.dp_groups()]
        )
        for step in range(cfg.train.n_steps)
    }


def find_steady_batches(cfg: RunConfig, order: Order) -> tuple[int, Evidence]:
    """Return a seed of batches whose routing does not depend on rounding, and the evidence of one process.

    If two experts are nearly tied for a token, the order of a layout's sums decides between them, and the
    results then differ by much more than rounding although nothing is wrong.
    """
    for seed in range(N_SEEDS):
        loader = SyntheticLoader(cfg, order, seed)
        evidence, nudged = train_plainly(cfg, loader), train_plainly(cfg, loader, nudge=NUDGE)
        limits = NUDGED_LIMITS.items()
        if all(compare_check(check, nudged[check], evidence[check], limit).agrees for check, limit in limits):
            break
    return seed, evidence
