"""One training run, at any layout through the real engine, or by hand in one process."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.runs import rank_batch, uneven_batch
from turnout.data.loader import IGNORE_INDEX, Batch
from turnout.moe.init_weights import init_weights
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import build_decoder
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_local_decoder, put_under_engine
from turnout.training.objective import Objective
from turnout.training.optimizers.adamw import ParamGroups, build_adamw, param_groups
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout, plan_layout
from turnout.training.step import accumulate, advance_router_state, apply_update

BuildOptimizer = Callable[[ParamGroups], torch.optim.Optimizer]
LR = 0.05


def build_sgd(groups: ParamGroups) -> torch.optim.Optimizer:
    return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=LR)


_groups: list[Groups] = []


def groups_of(layout: Layout, rank: int, device: str = "cpu") -> Groups:
    """Return a layout's groups. A process keeps only the last ones: hundreds of polling groups use a core."""
    if _groups and _groups[0].layout == layout and _groups[0].rank == rank:
        return _groups[0]
    forget_groups()
    gc.collect()
    _groups.append(Groups(layout, rank, torch.device(device), timeout_s=60))
    return _groups[0]


def forget_groups() -> None:
    while _groups:
        _groups.pop().close()


def build_objective(
    cfg: RunConfig, groups: Groups | None = None, dtype: torch.dtype = torch.float32
) -> Objective:
    """Build the decoder of one rank, or the whole one, with large weights, different for every expert."""
    if groups is not None:
        decoder = build_local_decoder(cfg, groups, dtype)
    else:
        decoder = build_decoder(cfg.model, dtype=dtype)
        init_weights(decoder, seed=cfg.train.seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(4.0)  # so that experts and router matter from the first step
    return Objective(decoder)


def starting_state(cfg: RunConfig, device: str = "cpu", *, is_collapsed: bool = False) -> RouterState:
    """Return the router state of step 0. If is_collapsed, its bias sends every token to the first experts."""
    state = RouterState.initial(cfg.model, device)
    if not is_collapsed:
        return state
    bias_E = torch.linspace(1000.0, 0.0, cfg.model.n_experts, device=device)
    return RouterState(bias_E.expand_as(state.bias_ME).clone(), state.load_frac_ME)


def train_on_ranks(
    rank: int,
    cfg: RunConfig,
    world_size: int,
    optimizer: str = "sgd",
    lr: float = LR,
    batch_at: Callable[[RunConfig, int], Batch] = uneven_batch,
    device: str = "cpu",
    is_collapsed: bool = False,
) -> dict[str, Any]:
    """Train cfg.train.n_steps through the real engine. Return losses, norms, statistics and, by name, the
    gradients of the first step and the fp32 parameters after the last step.
    """
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank, device)
    build = build_sgd if optimizer == "sgd" else partial(build_adamw, cfg=cfg.optim)
    engine = put_under_engine(build_objective(cfg, groups).to(device), cfg, groups, build)
    state = starting_state(cfg, device, is_collapsed=is_collapsed)
    losses, norms, stats, gradients = [], [], [], {}
    for step in range(cfg.train.n_steps):
        own_batch = rank_batch(batch_at(cfg, step), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
        totals = accumulate(engine, microbatches, state, step=step + 1, groups=groups)
        if step == 0:
            gradients = engine.gradients()
        result = apply_update(engine, totals, state, lr=lr)
        state = advance_router_state(state, result, cfg.model.balance)
        losses.append(float(result.loss))
        layer_means = (result.balance_loss, result.z_loss, result.entropy, result.n_dropped)
        stats.append([float(x) for x in layer_means])
        norms.append(result.outcome.grad_norm)
    parameters = engine.master_weights()
    engine.close()
    return {
        "losses": losses,
        "norms": norms,
        "stats": stats,
        "bias": state.bias_ME.clone(),
        "gradients": gradients,
        "parameters": parameters,
    }


def train_plainly(
    cfg: RunConfig, build: BuildOptimizer = build_sgd, lr: float = LR, *, is_collapsed: bool = False
) -> dict[str, Any]:
    """Train by hand: one process, one batch, plain torch optimizer and clipping, no engine."""
    objective = build_objective(cfg)
    state = starting_state(cfg, is_collapsed=is_collapsed)
    optimizer = build(param_groups(objective.named_parameters(), cfg.optim.weight_decay))
    for group in optimizer.param_groups:
        group["lr"] = lr
    losses, norms, stats, gradients = [], [], [], {}
    for step in range(cfg.train.n_steps):
        batch = uneven_batch(cfg, step)
        n_tokens = (batch.targets != IGNORE_INDEX).sum()
        sums = objective(batch, state)
        optimizer.zero_grad()
        (sums.total / n_tokens).backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in objective.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), cfg.train.clip_norm)))
        optimizer.step()
        state = state.after_step(sums.stats.counts_E, cfg.model.balance)
        losses.append(float(sums.nll / n_tokens))
        layer_sums = (sums.stats.balance_sum, sums.stats.z_sum, sums.stats.entropy_sum)
        means = [float(x.detach().mean() / n_tokens) for x in layer_sums]
        stats.append([*means, float(sums.stats.n_dropped.sum())])
    parameters = {name: p.detach() for name, p in objective.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "stats": stats,
        "bias": state.bias_ME,
        "gradients": gradients,
        "parameters": parameters,
    }


def with_split(cfg: RunConfig, microbatch_seqs: int, **train: Any) -> RunConfig:
    changed = cfg.train.model_copy(update={"microbatch_seqs": microbatch_seqs, **train})
    return cfg.model_copy(update={"train": changed})


def with_parallel(cfg: RunConfig, **parallel: Any) -> RunConfig:
    return cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=parallel)})
