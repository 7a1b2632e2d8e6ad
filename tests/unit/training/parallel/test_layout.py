"""Layout as integers, for every divisor of several world sizes, and the remedies of wrong ones."""

from typing import Any

import pytest

from tests.runs import run_config
from turnout.training.errors import ConfigError
from turnout.training.parallel.layout import Layout, divisors, n_microbatches, plan_layout

LAYOUTS = [
    Layout(world, tp=tp, ep=ep)
    for world in (1, 2, 6, 8, 12)
    for tp in divisors(world)
    for ep in divisors(world)
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"world {x.world_size} tp {x.tp} ep {x.ep}")
def test_groups_partition_the_world_and_agree_with_coordinates(layout: Layout) -> None:
    world = list(range(layout.world_size))
    assert layout.dp * layout.tp == layout.edp * layout.ep == layout.world_size
    for groups, size in (
        (layout.tp_groups(), layout.tp),
        (layout.dp_groups(), layout.dp),
        (layout.ep_groups(), layout.ep),
        (layout.edp_groups(), layout.edp),
    ):
        assert sorted(rank for group in groups for rank in group) == world
        assert {len(group) for group in groups} == {size}
    for group in layout.tp_groups():
        assert len({layout.dp_rank(r) for r in group}) == 1
        assert [layout.tp_rank(r) for r in group] == list(range(layout.tp))
    for group in layout.edp_groups():
        assert len({layout.ep_rank(r) for r in group}) == 1
        assert [layout.edp_rank(r) for r in group] == list(range(layout.edp))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if 24 % x.ep == 0], ids=str)
def test_each_expert_parallel_group_holds_every_expert_once(layout: Layout) -> None:
    for group in layout.ep_groups():
        assert [e for rank in group for e in layout.local_experts(rank, 24)] == list(range(24))


def test_expert_parallel_groups_may_span_tensor_parallel_ranks() -> None:
    layout = Layout(8, tp=2, ep=4)
    assert layout.ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.tp_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_wrong_layouts_name_the_value_and_what_fits() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel.ep=6 must divide world_size=16; use one of \[1, 2, 4, 8, 16\]"
    ):
        Layout(16, ep=6)
    with pytest.raises(
        ConfigError, match=r"parallel.ep=4 must divide model.n_experts=6; use one of \[1, 2\]"
    ):
        plan_layout(run_config(parallel={"ep": 4}), 8)
    with pytest.raises(ConfigError, match=r"parallel.tp=2 must divide model.n_kv_heads=1; use one of \[1\]"):
        plan_layout(run_config(parallel={"tp": 2}), 2)
    with pytest.raises(ConfigError, match="sequence_parallel=true has no effect with parallel.tp=1"):
        plan_layout(run_config(parallel={"sequence_parallel": True}), 2)
    with pytest.raises(ConfigError, match="ep_chunks=2 has no effect with parallel.ep=1"):
        plan_layout(run_config(parallel={"ep_chunks": 2}), 2)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({"vocab_size": 41}, {"tp": 2}, r"parallel.tp=2 must divide model.vocab_size=41; use one of \[1\]"),
        ({"seq_len": 14}, {"tp": 4}, r"parallel.tp=4 must divide model.seq_len=14; use one of \[1, 2\]"),
        (
            {"d_ff": 26, "n_dense_layers": 1},
            {"tp": 4},
            r"tp=4 must divide model.d_ff=26; use .* \[1, 2\]",
        ),
        (
            {"n_shared_experts": 1, "d_expert": 10},
            {"tp": 4},
            r"must divide model.n_shared_experts \* model.d_expert = 10; use one of \[1, 2\]",
        ),
        (
            {"n_experts": 12, "router": {"n_groups": 3}},
            {"ep": 4},
            r"parallel.ep=4 and model.router.n_groups=3 must divide one another, .*; use one of \[1\]",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_refused(
    model: dict[str, Any], parallel: dict[str, int], message: str
) -> None:
    fitting = {"n_heads": 4, "n_kv_heads": 4, "seq_len": 12, **model}
    batch = {"batch_tokens": 4 * fitting["seq_len"], "microbatch_seqs": 1, "expert_backend": "reference"}
    with pytest.raises(ConfigError, match=message):
        plan_layout(run_config(model=fitting, parallel=parallel, train=batch), 4)


def test_layouts_split_shared_experts_as_one_and_routed_ones_not_at_all() -> None:
    model = {"n_heads": 4, "n_kv_heads": 4, "d_expert": 10}
    for n_shared_experts in (0, 2):
        cfg = run_config(model={**model, "n_shared_experts": n_shared_experts}, parallel={"tp": 4})
        assert plan_layout(cfg, 4).tp == 4


def test_batches_that_do_not_divide_name_what_does() -> None:
    cfg = run_config(train={"batch_tokens": 96, "microbatch_seqs": 4})  # 8 sequences
    assert n_microbatches(cfg, Layout(2)) == 1
    with pytest.raises(
        ConfigError, match=r"4 data-parallel ranks .* use train.microbatch_seqs from \[1, 2\]"
    ):
        n_microbatches(cfg, Layout(4))
    with pytest.raises(ConfigError, match=r"use one of \[1, 2\] ranks"):
        n_microbatches(cfg, Layout(3))
