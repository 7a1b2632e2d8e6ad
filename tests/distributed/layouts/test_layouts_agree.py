"""Any number of ranks and micro-batches takes the same steps as plain torch: loss, norm and parameters."""

import math
from functools import partial

import pytest
import torch

from tests.assertions import assert_same_tensors
from tests.layouts import (
    LR,
    build_objective,
    groups_of,
    train_on_ranks,
    train_plainly,
    with_parallel,
    with_split,
)
from tests.ranks import run_ranks
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.moe.load_balancing import RouterState
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import put_under_engine
from turnout.training.engine.engine import StepOutcome
from turnout.training.errors import DivergedError
from turnout.training.guard import GuardState
from turnout.training.guard_policy import GuardPolicy
from turnout.training.hardware import cpu_has_fp16
from turnout.training.optimizers.adamw import build_adamw
from turnout.training.parallel.layout import Layout, plan_layout
from turnout.training.progress import Progress
from turnout.training.step import StepResult, StepTotals, advance_router_state, train_step

GENTLE_LR = 0.003  # for AdamW in half precision, where a large rate would amplify rounding

CONFIGS = {
    "sequence scope": run_config(model={"balance": {"coef": 0.5, "z_coef": 0.05}}),
    "batch scope, bias, shared": run_config(
        model={
            "n_shared_experts": 1,
            "router": {"score": "sigmoid", "scale": 1.5, "capacity_factor": 1.25},
            "balance": {"coef": 0.5, "scope": "batch", "bias_rate": 0.01},
        }
    ),
}
# (ranks, sequences per micro-batch): 8 sequences in 1, 2, 4 or 8 micro-batches on one rank, and so on.
SPLITS = [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 1)]


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.long)])
def test_every_split_equals_plain_sgd(cfg: RunConfig, zero_stage: int) -> None:
    cfg = with_parallel(cfg, zero_stage=zero_stage)
    want = train_plainly(cfg)
    assert max(want["norms"]) > cfg.train.clip_norm, "nothing was clipped, so this proves nothing"
    for world_size, microbatch_seqs in SPLITS:
        results = run_ranks(train_on_ranks, world_size, with_split(cfg, microbatch_seqs), world_size, "sgd")
        for got in results:
            where = f"{world_size} ranks x {microbatch_seqs} sequences"
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-5), where
            assert got["norms"] == pytest.approx(want["norms"], rel=1e-4), where
            assert torch.equal(got["bias"], want["bias"]), where
            assert torch.tensor(got["stats"]) == pytest.approx(torch.tensor(want["stats"]), rel=1e-4), where
            assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)


@pytest.mark.parametrize(
    "backend",
    [
        "sorted_loop",
        "torch_grouped",
        pytest.param("reference", marks=pytest.mark.long),
        pytest.param("compiled_loop", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_backend_equals_plain_sgd(cfg: RunConfig, backend: str) -> None:
    want = train_plainly(cfg)
    for ep, microbatch_seqs in ((1, 4), (2, 2)):
        split = with_split(with_parallel(cfg, ep=ep), microbatch_seqs, expert_backend=backend)
        for got in run_ranks(train_on_ranks, ep, split, ep, "sgd"):
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-5), f"ep={ep}"
            assert got["norms"] == pytest.approx(want["norms"], rel=1e-4), f"ep={ep}"
            assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_adamw_with_decay_equals_plain_torch_and_replicas_agree(zero_stage: int) -> None:
    cfg = with_parallel(CONFIGS["sequence scope"], zero_stage=zero_stage)
    want = train_plainly(cfg, partial(build_adamw, cfg=cfg.optim), GENTLE_LR)
    for world_size, microbatch_seqs in [(1, 8), (1, 2), (2, 2)]:
        results = run_ranks(
            train_on_ranks, world_size, with_split(cfg, microbatch_seqs), world_size, "adamw", GENTLE_LR
        )
        for got in results:
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
            # Adam divides by a root mean square, so rounding of a gradient near 0 changes a whole step.
            assert_same_tensors(got["parameters"], want["parameters"], rtol=2e-4)
            for name, value in results[0]["parameters"].items():
                assert torch.equal(got["parameters"][name], value), name


def step_in_vain(rank: int, cfg: RunConfig, world_size: int, is_poisoned: bool) -> tuple[bool, str]:
    """Take a step that must not be applied: a weight that the last rank reads is NaN, or it is not wanted.
    Return whether the weights stayed, and the error's message. After an unwanted step, take a wanted one: the
    optimizer must count it as its first.
    """
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank)
    objective = build_objective(cfg, groups)
    if is_poisoned:
        *others, last = (
            set(tokens.flatten().tolist()) for tokens in uneven_batch(cfg, 0).tokens.chunk(world_size)
        )
        with torch.no_grad():
            objective.decoder.embed.weight[min(last.difference(*others))] = float("nan")
    engine = put_under_engine(objective, cfg, groups, partial(build_adamw, cfg=cfg.optim))
    before = engine.master_weights()
    own_batch = rank_batch(uneven_batch(cfg, 0), layout.dp_rank(rank), layout.dp)
    microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
    state = RouterState.initial(cfg.model)
    policy = GuardPolicy(cfg, groups, Progress(state))
    is_wanted = policy.is_wanted if is_poisoned else lambda totals: False
    result = train_step(engine, microbatches, state, step=1, lr=LR, groups=groups, is_wanted=is_wanted)
    assert not result.outcome.was_applied
    message = ""
    try:
        policy.intervention(result)
    except DivergedError as err:
        message = str(err)
    after = engine.master_weights()
    stayed = all(torch.equal(after[n].nan_to_num(), v.nan_to_num()) for n, v in before.items())
    if not is_poisoned:
        again = train_step(engine, microbatches, state, step=2, lr=LR, groups=groups)
        assert again.outcome.was_applied and engine.optimizer_scalars() == {"step": 1.0}
        moved = engine.master_weights()
        assert not any(torch.equal(moved[name], value) for name, value in before.items())
    engine.close()
    return stayed, message


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_nan_never_reaches_the_weights_and_every_rank_reports_it(zero_stage: int, precision: str) -> None:
    cfg = with_split(with_parallel(CONFIGS["sequence scope"], zero_stage=zero_stage), 2, precision=precision)
    results = run_ranks(step_in_vain, 2, cfg, 2, is_poisoned=True)
    assert all(stayed for stayed, _ in results)
    (message,) = {message for _, message in results}
    assert "not finite on rank 1; the update was not applied" in message


def vote(rank: int, layout: Layout, in_favour: set[int]) -> bool:
    return groups_of(layout, rank).all_agree(rank in in_favour)


def test_ranks_agree_only_where_all_of_them_do() -> None:
    for in_favour in (set(), {0}, {1}, {0, 1}):
        agreed = in_favour == {0, 1}
        assert run_ranks(vote, 2, Layout(2, tp=2), in_favour) == [agreed, agreed]


def judge_at_the_limit(rank: int, cfg: RunConfig, kind: str, finder: int) -> tuple[bool, str, str]:
    """Judge a loss or a load at its limit; on one rank it is above by the last bit, or by a row."""
    # The mean is 3, and the variance 8 / (3 - 3 / 3) = 4.
    history = GuardState(n_losses=9, weight_sum=3.0, weight_sq_sum=3.0, mean=3.0, sq_dev_sum=8.0)
    policy = GuardPolicy(
        cfg, groups_of(Layout(2), rank), Progress(RouterState.initial(cfg.model), guard=history)
    )
    loss, counts_E = 15.0, [4, 2, 2, 1, 1, 0]
    if rank == finder and kind == "spike":
        loss = math.nextafter(15.0, 16.0)
    elif rank == finder:
        counts_E[0] = 5
    sums = torch.tensor([loss, 0, 0, 0, 0, 0, *counts_E], dtype=torch.float64)
    totals, zero = StepTotals(torch.tensor(1), sums, sums[0]), torch.zeros(())
    is_wanted = policy.is_wanted(totals)
    outcome = StepOutcome(1.0, is_wanted)
    intervention = policy.intervention(
        StepResult(totals.loss, zero, zero, zero, totals.counts, zero, zero, zero, outcome)
    )
    assert intervention is not None, f"rank {rank}"
    return is_wanted, intervention.anomaly.kind, intervention.action


@pytest.mark.parametrize("finder", [0, 1])
@pytest.mark.parametrize(("kind", "action"), [("spike", "skip"), ("collapse", "rollback")])
def test_a_finding_of_one_rank_is_acted_on_by_all_ranks(kind: str, action: str, finder: int) -> None:
    guard = {"on_spike": "skip", "spike_window_steps": 5, "on_collapse": "rollback", "max_load_frac": 0.4}
    guard |= {"collapse_patience_steps": 1}
    cfg = run_config(model={"n_layers": 1}, guard=guard, checkpoint={"every_steps": 1})
    assert run_ranks(judge_at_the_limit, 2, cfg, kind, finder) == [(False, kind, action)] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_step_that_is_not_wanted_changes_nothing_and_leaves_no_trace(
    zero_stage: int, precision: str
) -> None:
    cfg = with_parallel(CONFIGS["sequence scope"], zero_stage=zero_stage, ep=2)
    cfg = with_split(cfg, 2, precision=precision)
    assert all(stayed for stayed, _ in run_ranks(step_in_vain, 2, cfg, 2, is_poisoned=False))


def test_a_step_that_was_not_applied_leaves_the_router_state() -> None:
    cfg = CONFIGS["batch scope, bias, shared"]
    state = RouterState.initial(cfg.model)
    counts = torch.arange(state.bias_ME.numel()).view_as(state.bias_ME)
    zero = torch.zeros(())
    for was_applied in (False, True):
        result = StepResult(zero, zero, zero, zero, counts, zero, zero, zero, StepOutcome(1.0, was_applied))
        after = advance_router_state(state, result, cfg.model.balance)
        assert (after is state) == (not was_applied)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_half_precision_follows_fp32_at_every_split(precision: str, zero_stage: int) -> None:
    if precision == "fp16" and not cpu_has_fp16():
        pytest.skip("this CPU has no fp16 arithmetic, so DeepSpeed refuses fp16; tests/gpu covers it")
    cfg = with_parallel(CONFIGS["sequence scope"], zero_stage=zero_stage)
    (full,) = run_ranks(train_on_ranks, 1, with_split(cfg, 8), 1, "adamw", GENTLE_LR)
    for world_size, microbatch_seqs in [(1, 8), (1, 2), (2, 4), (2, 2)]:
        half = with_split(cfg, microbatch_seqs, precision=precision)
        got = run_ranks(train_on_ranks, world_size, half, world_size, "adamw", GENTLE_LR)[0]
        # Measured in bf16: losses within 5e-4 and norms within 7e-3 of fp32, at every split.
        assert got["losses"] == pytest.approx(full["losses"], rel=2e-3)
        assert got["norms"] == pytest.approx(full["norms"], rel=2e-2)
