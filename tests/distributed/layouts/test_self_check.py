"""The engine's check of its own first step: it passes correct reductions and reports wrong ones."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

import turnout.training.engine.engine
from tests.layouts import build_objective, groups_of, starting_state, with_parallel
from tests.ranks import run_ranks
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import put_under_engine
from turnout.training.engine.first_step_check import FirstStepCheck, ReducedFragment
from turnout.training.errors import EngineError
from turnout.training.optimizers.adamw import build_adamw
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout, plan_layout
from turnout.training.step import train_step

CFG = with_parallel(run_config(model={"n_heads": 4, "n_kv_heads": 2, "n_experts": 8}), tp=2, ep=2)


def nothing(groups: Groups) -> None:
    """Leave the engine as it is."""


def over_the_wrong_ranks(groups: Groups) -> None:
    """Let DeepSpeed reduce experts over the ranks of another group."""
    groups.edp = groups.ep


def norm_without_split_parameters(groups: Groups) -> None:
    """Let DeepSpeed treat split parameters as replicas."""
    turnout.training.engine.engine.mark_split_parameters = lambda module, layout: None


def by_a_factor(groups: Groups) -> None:
    """Let DeepSpeed divide by the wrong number of ranks."""
    turnout.training.engine.engine._Mpu.get_data_parallel_group = lambda self: groups.tp


def first_step(rank: int, cfg: RunConfig, break_it: Callable[[Groups], None]) -> str:
    layout = plan_layout(cfg, 4)
    kept = (
        turnout.training.engine.engine.mark_split_parameters,
        turnout.training.engine.engine._Mpu.get_data_parallel_group,
    )
    broken = groups_of(layout, rank)
    right_edp = broken.edp
    try:
        objective = build_objective(cfg, broken)
        break_it(broken)
        engine = put_under_engine(objective, cfg, broken, partial(build_adamw, cfg=cfg.optim))
        broken.edp = right_edp
        own_batch = rank_batch(uneven_batch(cfg, 0), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
        train_step(engine, microbatches, starting_state(cfg), step=1, lr=1e-3, groups=broken)
    except EngineError as err:
        return str(err)
    finally:
        broken.edp = right_edp
        (
            turnout.training.engine.engine.mark_split_parameters,
            turnout.training.engine.engine._Mpu.get_data_parallel_group,
        ) = kept
    return ""


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize(
    ("break_it", "reported"),
    [
        (nothing, ""),
        (over_the_wrong_ranks, "gradient of decoder.blocks"),
        (norm_without_split_parameters, "gradient norm is"),
        (by_a_factor, "differs from the sum over ranks"),
    ],
)
def test_a_wrong_reduction_is_named_on_every_rank(
    break_it: Callable[[Groups], None], reported: str, zero_stage: int
) -> None:
    messages = run_ranks(first_step, 4, with_parallel(CFG, zero_stage=zero_stage), break_it)
    assert len(set(messages)) == 1, messages
    assert reported in messages[0] and bool(messages[0]) == bool(reported)


@pytest.mark.parametrize("parallel", [{"ep": 2}, {"tp": 2}, {"tp": 2, "ep": 4}, {"tp": 4, "ep": 2}], ids=str)
def test_a_right_reduction_is_accepted_at_every_layout(parallel: dict[str, int]) -> None:
    """Most of the gradient is that of the routers, which each tensor-parallel rank holds whole."""
    sizes = {"n_heads": 4, "n_kv_heads": 4, "n_experts": 8, "balance": {"coef": 50.0, "z_coef": 5.0}}
    cfg = run_config(model=sizes, train={"batch_tokens": 96, "microbatch_seqs": 2}, parallel=parallel)
    assert run_ranks(first_step, 4, cfg, nothing) == [""] * 4


def check_a_wrong_part(rank: int, n_ranks: int, culprit: int) -> str:
    """Check a layer's reduced gradient. Each rank updates an equal part; that of the culprit is wrong."""
    groups = groups_of(Layout(n_ranks), rank)
    layer = torch.nn.Linear(40, 6, bias=False)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    check = FirstStepCheck(layer, groups, has_expert_groups=False)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(rank))
    (n_ranks * layer(x).square().sum()).backward()
    assert layer.weight.grad is not None
    reduced = groups.sum_over_ranks(layer.weight.grad.flatten().clone()) / n_ranks
    part = reduced.chunk(n_ranks)[rank] * (1.1 if rank == culprit else 1.0)
    try:
        check.check_gradients([ReducedFragment("weight", rank * part.numel(), part)])
    except EngineError as err:
        return str(err)
    return ""


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_a_fault_of_one_rank_is_named_on_all(culprit: int) -> None:
    assert run_ranks(check_a_wrong_part, 4, 4, -1) == [""] * 4
    (message,) = set(run_ranks(check_a_wrong_part, 4, 4, culprit))
    assert "gradient of weight differs from the sum over ranks by" in message
    assert f"(on rank {culprit})" in message
