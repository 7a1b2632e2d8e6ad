"""Replicas stay equal bit for bit; half precision stays near fp32 at every layout."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.layouts import (
    build_objective,
    groups_of,
    starting_state,
    train_on_ranks,
    with_parallel,
    with_split,
)
from tests.ranks import run_ranks
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.moe.parallel.sharding import split_of
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import put_under_engine
from turnout.training.optimizers.adamw import build_adamw
from turnout.training.parallel.layout import plan_layout
from turnout.training.step import advance_router_state, train_step

CFG = run_config(
    model={
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_experts": 8,
        "n_shared_experts": 1,
        "n_dense_layers": 1,
        "n_layers": 3,
        "d_ff": 24,
        "qk_norm": True,
        "router": {"score": "sigmoid"},
        "balance": {"coef": 0.5, "scope": "batch", "bias_rate": 0.01},
    },
    train={"n_steps": 50, "microbatch_seqs": 1},
)
LAYOUTS = [
    {"tp": 2, "ep": 4, "sequence_parallel": True},
    {"tp": 4, "ep": 2},
    {"tp": 1, "ep": 2, "zero_stage": 2},
    {"tp": 2, "ep": 1, "zero_stage": 2, "sequence_parallel": True},
]


def train_and_show(rank: int, cfg: RunConfig, world_size: int) -> dict[str, torch.Tensor]:
    """Take AdamW steps and return this rank's own parameters and router state, ungathered."""
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank)
    objective = build_objective(cfg, groups)
    engine = put_under_engine(objective, cfg, groups, partial(build_adamw, cfg=cfg.optim))
    state = starting_state(cfg)
    for step in range(cfg.train.n_steps):
        own_batch = rank_batch(uneven_batch(cfg, step), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
        result = train_step(engine, microbatches, state, step=step + 1, lr=3e-3, groups=groups)
        state = advance_router_state(state, result, cfg.model.balance)
    held = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    engine.close()
    return {**held, "bias": state.bias_ME, "load": state.load_frac_ME}


def first_of(n: int, values: list[Any]) -> list[Any]:
    """Return test parameters: `make test` runs the first n, `make test-all` all of them."""
    marks = [[]] * n + [[pytest.mark.long]] * (len(values) - n)
    return [pytest.param(value, id=str(value), marks=mark) for value, mark in zip(values, marks, strict=True)]


@pytest.mark.parametrize("precision", first_of(1, ["bf16", "fp32"]))
@pytest.mark.parametrize("parallel", first_of(1, LAYOUTS))
def test_fifty_adamw_steps_leave_replicas_bitwise_equal(parallel: dict[str, int], precision: str) -> None:
    cfg = with_split(with_parallel(CFG, **parallel), 2 * parallel["tp"], precision=precision)
    held = run_ranks(train_and_show, 4, cfg, 4)
    layout = plan_layout(cfg, 4)
    replicas = {None: [list(range(4))], "tp": layout.dp_groups(), "ep": layout.edp_groups()}
    for name in held[0]:
        split = split_of(name)
        for ranks in replicas[split and split.over]:
            for rank in ranks:
                assert torch.equal(held[rank][name], held[ranks[0]][name]), f"{name} on rank {rank}"


@pytest.mark.parametrize("parallel", first_of(1, LAYOUTS))
def test_bf16_follows_fp32_at_every_layout(parallel: dict[str, int]) -> None:
    cfg = with_split(CFG, 8, n_steps=10)
    (full,) = run_ranks(train_on_ranks, 1, cfg, 1, "adamw", 3e-3)
    half = with_split(with_parallel(cfg, **parallel), 2, precision="bf16", recompute="full")
    for got in run_ranks(train_on_ranks, 4, half, 4, "adamw", 3e-3):
        assert got["losses"] == pytest.approx(full["losses"], rel=3e-3)
        assert got["norms"] == pytest.approx(full["norms"], rel=3e-2)
