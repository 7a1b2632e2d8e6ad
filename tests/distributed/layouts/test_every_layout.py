"""Every layout of 1, 2, 4 and 8 ranks takes the same step as one process: gradients in fp64 without the
engine, three steps in fp32 through it.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.assertions import assert_same_grads, assert_same_tensors
from tests.layouts import (
    build_objective,
    groups_of,
    starting_state,
    train_on_ranks,
    train_plainly,
    with_parallel,
    with_split,
)
from tests.ranks import run_ranks
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.data.loader import IGNORE_INDEX
from turnout.moe.parallel.sharding import is_expert
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout, divisors, plan_layout

SIZES = {"n_heads": 8, "n_kv_heads": 8, "d_head": 4, "seq_len": 16, "n_experts": 8, "qk_norm": True}
TRAIN = {"n_steps": 3, "batch_tokens": 128, "microbatch_seqs": 1}
MODELS: dict[str, dict[str, Any]] = {
    "softmax top-2, sequence scope": {"balance": {"coef": 0.5, "z_coef": 0.05}},
    "sigmoid top-2, shared, dense first, batch scope, bias": {
        "n_shared_experts": 1,
        "n_dense_layers": 1,
        "n_layers": 3,
        "d_ff": 24,
        "router": {"score": "sigmoid", "scale": 1.5},
        "balance": {"coef": 0.5, "scope": "batch", "bias_rate": 0.01},
    },
    "top-1, capacity, tied": {
        "top_k": 1,
        "tie_embeddings": True,
        "router": {"normalize": False, "capacity_factor": 1.0},
        "balance": {"coef": 0.5, "scope": "batch"},
    },
    "top-8 in groups, window": {
        "n_experts": 16,
        "top_k": 8,
        "sliding_window": 7,
        "router": {"score": "sigmoid", "n_groups": 4, "top_groups": 3},
        "balance": {"coef": 0.5, "bias_rate": 0.01},
    },
}
CONFIGS = {
    name: run_config(model={**SIZES, **model}, train=TRAIN, optim={"schedule": {}})
    for name, model in MODELS.items()
}
LAYOUTS = [
    Layout(world, tp=tp, ep=ep) for world in (1, 2, 4, 8) for tp in divisors(world) for ep in divisors(world)
]
IDS = [f"world{x.world_size}-tp{x.tp}-ep{x.ep}" for x in LAYOUTS]
# Eight ranks take most of the time, so `make test` runs only these (tp, ep); `make test-all` runs all.
OF_EIGHT = {(1, 8), (2, 4), (4, 8), (8, 2)}


def marks_of(layout: Layout) -> list[pytest.MarkDecorator]:
    is_first = layout.world_size < 8 or (layout.tp, layout.ep) in OF_EIGHT
    return [] if is_first else [pytest.mark.long]


EVERY_LAYOUT = [
    pytest.param(layout, id=name, marks=marks_of(layout)) for layout, name in zip(LAYOUTS, IDS, strict=True)
]

# How expert rows are sent. Each layout and each model meets all of these.
CHUNKS: list[dict[str, Any]] = [
    {},
    {"ep_chunks": 2},
    {"ep_max_load": 0.4},
    {"ep_chunks": 2, "ep_max_load": 0.7},
]


def lay_out(cfg: RunConfig, layout: Layout, *, chunks: int, **changes: Any) -> RunConfig:
    settings = CHUNKS[(chunks + LAYOUTS.index(layout)) % len(CHUNKS)] if layout.ep > 1 else {}
    return with_parallel(cfg, tp=layout.tp, ep=layout.ep, **settings, **changes)


def sum_gradients(rank: int, cfg: RunConfig, world_size: int, is_collapsed: bool) -> dict[str, Tensor] | None:
    """Return on the first rank the whole fp64 gradients of one step, reduced here, not by the engine."""
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank)
    objective = build_objective(cfg, groups, torch.float64)
    batch = uneven_batch(cfg, 0)
    n_tokens = (batch.targets != IGNORE_INDEX).sum()
    state = starting_state(cfg, is_collapsed=is_collapsed)
    own_batch = rank_batch(batch, layout.dp_rank(rank), layout.dp)
    for microbatch in split_microbatches(own_batch, cfg.train.microbatch_seqs):
        (objective(microbatch, state).total / n_tokens).backward()
    own = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, f"rank {rank}: no gradient reached {name}"
        own[name] = parameter.grad
    summed = sum_at_once({n: g for n, g in own.items() if is_expert(n)}, groups.sum_over_expert_replicas)
    summed |= sum_at_once({n: g for n, g in own.items() if not is_expert(n)}, groups.sum_over_tokens)
    whole = {name: groups.whole(name, summed[name]) for name in own}
    return whole if rank == 0 else None


def sum_at_once(own: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Reduce many tensors in one collective: among eight ranks on two cores each one costs 5 ms."""
    flat = reduce(torch.cat([tensor.flatten() for tensor in own.values()]))
    parts = flat.split([tensor.numel() for tensor in own.values()])
    return {name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)}


@cache
def gradients_of_one_process(model: str, is_collapsed: bool) -> dict[str, Tensor]:
    (want,) = run_ranks(sum_gradients, 1, with_split(CONFIGS[model], 8), 1, is_collapsed)
    if is_collapsed:
        # The biased router leaves most experts without a row: their gradient is zero, not missing.
        assert any(not expert.any() for expert in want["decoder.blocks.1.moe.experts.gate_up"])
    return want


class GradientRun(NamedTuple):
    """One comparison in fp64, and its value on each axis."""

    layout: Layout
    model: str
    is_collapsed: bool
    sequence_parallel: bool
    recompute: str


def gradient_runs() -> list[GradientRun]:
    """Return one run for each layout and model; the values of the other axes are spread over the runs.

    All combinations would be 1,200 runs. An error usually depends on few axes at once: a reduction of one
    layout under sequence parallelism, an all-to-all after a collapse. So each run takes the values that its
    layout, then its model, has met least often. test_runs_cover checks which combinations occur.
    """
    n_met: Counter[Any] = Counter()
    runs = []
    for layout, model in product(LAYOUTS, CONFIGS):
        choices = product((False, True), sorted({False, layout.tp > 1}), ("none", "selective", "full"))

        def how_often(choice: tuple[Any, ...], layout: Layout = layout, model: str = model) -> list[int]:
            facts = list(enumerate(choice))
            with_layout = sum(n_met[layout, fact] for fact in facts)
            pairs = [(model, layout.tp > 1, *pair) for pair in combinations(facts, 2)]
            return [with_layout, n_met[model, layout.tp > 1, choice], sum(n_met[pair] for pair in pairs)]

        choice = min(choices, key=how_often)
        facts = list(enumerate(choice))
        n_met.update((layout, fact) for fact in facts)
        n_met.update((model, layout.tp > 1, *pair) for pair in combinations(facts, 2))
        n_met[model, layout.tp > 1, choice] += 1
        runs.append(GradientRun(layout, model, *choice))
    return runs


def test_runs_cover() -> None:
    runs = gradient_runs()
    kinds = {"none", "selective", "full"}
    for layout in LAYOUTS:
        own = [run for run in runs if run.layout == layout]
        assert {run.model for run in own} == set(CONFIGS)
        assert {run.is_collapsed for run in own} == {False, True}
        assert {run.sequence_parallel for run in own} == {False, layout.tp > 1}
        assert {run.recompute for run in own} == kinds
    # All combinations of the axes other than the layout occur, with and without tensor parallelism.
    unsplit = set(product(CONFIGS, (False, True), (False,), kinds))
    assert {run[1:] for run in runs if run.layout.tp == 1} == unsplit
    split = set(product(CONFIGS, (False, True), (False, True), kinds))
    assert {run[1:] for run in runs if run.layout.tp > 1} == split


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_every_gradient_is_that_of_one_process_in_fp64(layout: Layout) -> None:
    for i, run in enumerate(run for run in gradient_runs() if run.layout == layout):
        cfg = CONFIGS[run.model]
        laid_out = lay_out(cfg, layout, chunks=i, sequence_parallel=run.sequence_parallel)
        laid_out = with_split(laid_out, microbatch_seqs(cfg, layout, 2), recompute=run.recompute)
        world_size = layout.world_size
        got, *_ = run_ranks(sum_gradients, world_size, laid_out, world_size, run.is_collapsed)
        assert_same_grads(got, gradients_of_one_process(run.model, run.is_collapsed), rtol=1e-10)


def microbatch_seqs(cfg: RunConfig, layout: Layout, n_microbatches: int) -> int:
    """Return the micro-batch size that gives n_microbatches per step, or as many as there are sequences."""
    return max(1, cfg.batch_seqs // layout.dp // n_microbatches)


# Each layout meets two of these and two of the models; all of them meet all sizes.
VARIANTS: list[dict[str, Any]] = [
    {"zero_stage": 1, "recompute": "none", "n_microbatches": 2},
    {"zero_stage": 2, "recompute": "full", "n_microbatches": 1},
    {"zero_stage": 1, "recompute": "selective", "n_microbatches": 1, "sequence_parallel": True},
    {"zero_stage": 2, "recompute": "none", "n_microbatches": 4, "sequence_parallel": True},
]


def engine_runs() -> list[Any]:
    runs = []
    for i, layout in enumerate(LAYOUTS):
        for j in range(2):
            model = list(CONFIGS)[(i + 2 * j + i // 4) % len(CONFIGS)]
            variant = (i + j + i // 3) % len(VARIANTS)
            name = f"{IDS[i]}, {model}, variant {variant}"
            values = (layout, model, VARIANTS[variant], j == 1)
            # `make test` runs one of the two.
            marks = [pytest.mark.long] if j != i % 2 else marks_of(layout)
            runs.append(pytest.param(*values, id=name, marks=marks))
    return runs


@cache
def steps_of_one_process(model: str, is_collapsed: bool) -> dict[str, Any]:
    return train_plainly(CONFIGS[model], is_collapsed=is_collapsed)


@pytest.mark.parametrize(("layout", "model", "variant", "is_collapsed"), engine_runs())
def test_three_steps_through_the_engine_are_those_of_one_process(
    layout: Layout, model: str, variant: dict[str, Any], is_collapsed: bool
) -> None:
    want = steps_of_one_process(model, is_collapsed)
    cfg = lay_out(
        CONFIGS[model],
        layout,
        chunks=list(CONFIGS).index(model),
        zero_stage=variant["zero_stage"],
        sequence_parallel=variant.get("sequence_parallel", False) and layout.tp > 1,
    )
    seqs = microbatch_seqs(cfg, layout, variant["n_microbatches"])
    cfg, world_size = with_split(cfg, seqs, recompute=variant["recompute"]), layout.world_size
    for got in run_ranks(train_on_ranks, world_size, cfg, world_size, "sgd", is_collapsed=is_collapsed):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)
        assert torch.tensor(got["stats"]) == pytest.approx(torch.tensor(want["stats"]), rel=1e-4)
        assert torch.equal(got["bias"], want["bias"])
        assert_same_grads(got["gradients"], want["gradients"], rtol=1e-5)
        assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(Layout(2, ep=2), "full", id="ep2"),
        pytest.param(Layout(2, tp=2, ep=2), "selective", id="tp2-ep2"),
    ],
)
def test_three_steps_of_compiled_blocks_are_those_of_one_process(layout: Layout, recompute: str) -> None:
    model = "sigmoid top-2, shared, dense first, batch scope, bias"
    want = steps_of_one_process(model, False)
    cfg = lay_out(CONFIGS[model], layout, chunks=0, sequence_parallel=layout.tp > 1)
    cfg = with_split(cfg, microbatch_seqs(cfg, layout, 2), recompute=recompute, compile=True)
    for got in run_ranks(train_on_ranks, 2, cfg, 2, "sgd"):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)
        assert torch.equal(got["bias"], want["bias"])
        assert_same_grads(got["gradients"], want["gradients"], rtol=1e-5)
        assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)
