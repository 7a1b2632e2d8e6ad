"""The same steps whatever the number of ranks and micro-batches: loss, norm, parameters, and against plain
torch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from data.loader import Batch
from moe.balance import RouterState
from moe.init import init_weights
from moe.model import build_decoder
from tests.assertions import assert_same_tensors
from tests.ranks import run_ranks
from tests.runs import rank_share, run_config, uneven_batch
from training.batches import split_microbatches
from training.config import RunConfig
from training.engine import Engine
from training.hardware import cpu_has_fp16
from training.objective import Objective
from training.optimizer import ParamGroups, build_adamw, param_groups
from training.parallel import Groups, Layout, n_microbatches
from training.step import advance_router_state, train_step

LR = 0.05
GENTLE_LR = 0.003  # for AdamW in half precision, where a large rate would amplify rounding


def build_sgd(groups: ParamGroups) -> torch.optim.Optimizer:
    return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=LR)


def build_objective(cfg: RunConfig) -> Objective:
    decoder = build_decoder(cfg.model, expert_backend="grouped")
    init_weights(decoder, seed=cfg.train.seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(4.0)  # so that experts and router matter from the first step
    return Objective(decoder)


def train_on_ranks(
    rank: int,
    cfg: RunConfig,
    world_size: int,
    optimizer: str,
    lr: float = LR,
    batch_at: Callable[[RunConfig, int], Batch] = uneven_batch,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train cfg.train.n_steps through the real engine; return losses, norms and fp32 parameters."""
    layout = Layout(world_size)
    groups = Groups(layout, rank, torch.device(device))
    objective = build_objective(cfg).to(device)
    build = build_sgd if optimizer == "sgd" else partial(build_adamw, cfg=cfg.optim)
    engine = Engine(
        objective,
        cfg.train,
        groups,
        zero_stage=cfg.parallel.zero_stage,
        n_microbatches=n_microbatches(cfg, layout),
        param_groups=param_groups(objective.named_parameters(), cfg.optim.weight_decay),
        build_optimizer=build,
    )
    state = RouterState.initial(cfg.model, device)
    losses, norms, balance = [], [], []
    for step in range(cfg.train.n_steps):
        share = rank_share(batch_at(cfg, step), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(share, cfg.train.microbatch_seqs)
        result = train_step(engine, microbatches, state, lr=lr, groups=groups)
        state = advance_router_state(state, result, cfg.model.balance)
        losses.append(float(result.loss))
        balance.append(float(result.balance_loss))
        norms.append(result.outcome.grad_norm)
    parameters = engine.master_weights()
    engine.close()
    return {
        "losses": losses,
        "norms": norms,
        "balance": balance,
        "bias": state.bias_ME.clone(),
        "parameters": parameters,
    }


def train_plainly(cfg: RunConfig) -> dict[str, Any]:
    """Train by hand: one process, one batch, plain torch SGD and clipping, no engine."""
    objective = build_objective(cfg)
    state = RouterState.initial(cfg.model)
    optimizer = torch.optim.SGD(objective.parameters(), lr=LR)
    losses, norms = [], []
    for step in range(cfg.train.n_steps):
        batch = uneven_batch(cfg, step)
        n_tokens = (batch.targets != -100).sum()
        sums = objective(batch, state)
        optimizer.zero_grad()
        (sums.total / n_tokens).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), cfg.train.clip_norm)))
        optimizer.step()
        state = state.after_step(sums.stats.counts_E, cfg.model.balance)
        losses.append(float(sums.nll / n_tokens))
    parameters = {name: p.detach() for name, p in objective.named_parameters()}
    return {"losses": losses, "norms": norms, "bias": state.bias_ME, "parameters": parameters}


CONFIGS = {
    "sequence scope": run_config(model={"balance": {"coef": 0.5, "z_coef": 0.05}}),
    "batch scope, bias, shared": run_config(
        model={
            "n_shared_experts": 1,
            "router": {"score": "sigmoid", "scale": 1.5},
            "balance": {"coef": 0.5, "scope": "batch", "bias_rate": 0.01},
        }
    ),
}
# (ranks, sequences per micro-batch): 8 sequences as 1x8, 2x4, 4x2 and 8x1 micro-batches on one rank, and on
# two.
SPLITS = [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 1)]


def with_split(cfg: RunConfig, microbatch_seqs: int, **train: Any) -> RunConfig:
    changed = cfg.train.model_copy(update={"microbatch_seqs": microbatch_seqs, **train})
    return cfg.model_copy(update={"train": changed})


def with_stage(cfg: RunConfig, zero_stage: int) -> RunConfig:
    return cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"zero_stage": zero_stage})})


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_every_split_equals_plain_sgd(cfg: RunConfig, zero_stage: int) -> None:
    cfg = with_stage(cfg, zero_stage)
    want = train_plainly(cfg)
    assert max(want["norms"]) > cfg.train.clip_norm, "clipping must be at work"
    for world_size, microbatch_seqs in SPLITS:
        results = run_ranks(train_on_ranks, world_size, with_split(cfg, microbatch_seqs), world_size, "sgd")
        for got in results:
            where = f"{world_size} ranks x {microbatch_seqs} sequences"
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-5), where
            assert got["norms"] == pytest.approx(want["norms"], rel=1e-4), where
            assert torch.equal(got["bias"], want["bias"]), where
            assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)


def test_replicas_and_two_ranks_of_adamw_agree() -> None:
    cfg = CONFIGS["sequence scope"]
    (alone,) = run_ranks(train_on_ranks, 1, with_split(cfg, 8), 1, "adamw")
    first, second = run_ranks(train_on_ranks, 2, with_split(cfg, 2), 2, "adamw")
    assert first["losses"] == second["losses"]
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["balance"] == pytest.approx(alone["balance"], rel=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32_at_every_split(precision: str, zero_stage: int) -> None:
    if precision == "fp16" and not cpu_has_fp16():
        pytest.skip("this CPU has no fp16 arithmetic and DeepSpeed refuses it; tests/gpu has it on a GPU")
    cfg = with_stage(CONFIGS["sequence scope"], zero_stage)
    (full,) = run_ranks(train_on_ranks, 1, with_split(cfg, 8), 1, "adamw", GENTLE_LR)
    for world_size, microbatch_seqs in [(1, 8), (1, 2), (2, 4), (2, 2)]:
        half = with_split(cfg, microbatch_seqs, precision=precision)
        got = run_ranks(train_on_ranks, world_size, half, world_size, "adamw", GENTLE_LR)[0]
        # Measured in bf16: losses within 5e-4 and norms within 7e-3 of fp32, at every split.
        assert got["losses"] == pytest.approx(full["losses"], rel=2e-3)
        assert got["norms"] == pytest.approx(full["norms"], rel=2e-2)
