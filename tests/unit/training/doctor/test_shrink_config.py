"""The small version of a config has the same structure and layouts; and the list of variants to compare."""

import math
from typing import Any

import pytest
from rich.console import Console

from turnout.launch.commands.doctor import print_replaced
from turnout.launch.settings import load_config, recipe_names
from turnout.moe.config import ModelConfig
from turnout.training.config.guard import GuardConfig
from turnout.training.config.run import RunConfig
from turnout.training.doctor.layouts_to_try import Variant, list_variants, richest, split_layouts
from turnout.training.doctor.shrink_config import CLIP_NORM, shrink
from turnout.training.parallel.layout import Layout, plan_layout

# DeepSeek-V3's kinds of layers and routing, with sizes that 2 ranks divide and 3 do not.
GROUPED: dict[str, Any] = {
    "n_layers": 27,
    "n_dense_layers": 3,
    "d_ff": 10240,
    "n_experts": 256,
    "top_k": 8,
    "n_shared_experts": 2,
    "sliding_window": 1024,
    "qk_norm": True,
    "router": {
        "score": "sigmoid",
        "n_groups": 8,
        "top_groups": 4,
        "scale": 2.5,
        "capacity_factor": 3.0,
    },
    "balance": {"coef": 1e-4, "scope": "batch", "bias_rate": 1e-3},
}


def grouped_config() -> RunConfig:
    tree = load_config("qwen3-30b-a3b").model_dump()
    tree["model"] |= GROUPED
    tree["optim"]["schedule"] |= {"kind": "wsd", "decay_frac": 0.2}
    return RunConfig.model_validate(tree)


CONFIGS = {name: load_config(name) for name in recipe_names()} | {"grouped": grouped_config()}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_the_same_layouts_fit_the_small_version(cfg: RunConfig, world_size: int) -> None:
    small = shrink(cfg, world_size)
    assert split_layouts(small, world_size)[0] == split_layouts(cfg, world_size)[0]
    plan_layout(small, world_size)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_structure_is_unchanged_and_sizes_are_tiny(cfg: RunConfig) -> None:
    small = shrink(cfg, 4)
    was, now = cfg.model, small.model
    for name in ("top_k", "n_shared_experts", "qk_norm", "tie_embeddings", "rope_theta", "router", "balance"):
        assert getattr(now, name) == getattr(was, name), name
    assert now.n_heads // now.n_kv_heads == was.n_heads // was.n_kv_heads
    assert bool(now.n_dense_layers) == bool(was.n_dense_layers)
    assert (now.sliding_window is None) == (was.sliding_window is None)
    assert small.train.precision == cfg.train.precision
    assert small.optim.schedule.kind == cfg.optim.schedule.kind
    assert small.optim.weight_decay == cfg.optim.weight_decay
    assert small.train.clip_norm == CLIP_NORM
    assert now.n_layers <= 3 and now.d_model <= 64 and now.seq_len <= 16
    assert now.init_std * math.sqrt(now.d_model) == pytest.approx(was.init_std * math.sqrt(was.d_model))


def test_unset_clipping_stays_unset() -> None:
    cfg = load_config("tiny", ["train.clip_norm=none"])
    assert shrink(cfg, 2).train.clip_norm is None


def test_a_guard_that_needs_more_steps_is_left_out() -> None:
    limits = ["guard.max_dead_frac=0.5", "guard.on_collapse=rollback", "guard.on_spike=rollback"]
    assert shrink(load_config("tiny", limits), 2).guard == GuardConfig()


def test_groups_still_choose_and_capacity_still_drops() -> None:
    model: ModelConfig = shrink(grouped_config(), 4).model
    assert model.n_experts < 256 and model.n_experts % 8 == 0
    assert model.n_experts // 8 * 4 >= 2 * model.top_k, "a token chooses within its groups"
    assert model.router.capacity_factor is not None
    assert model.router.capacity_factor * model.top_k < model.n_experts


def test_a_config_that_is_already_small_keeps_its_sizes() -> None:
    sizes = ["model.d_model=16", "model.d_expert=8", "model.n_experts=4", "model.vocab_size=40"]
    cfg = load_config("tiny", [*sizes, "model.seq_len=8", "sample.n_tokens=4"])
    model = shrink(cfg, 2).model
    assert (model.d_model, model.d_expert, model.n_experts) == (16, 8, 4)
    assert (model.vocab_size, model.seq_len, model.init_std) == (40, 8, cfg.model.init_std)


def test_refused_layouts_have_a_reason() -> None:
    fitting, refused = split_layouts(load_config("mixtral-8x7b"), 16)
    assert Layout(16, tp=8, ep=8) in fitting
    assert refused[Layout(16, tp=1, ep=16)] == "ep=16 must divide model.n_experts=8"
    assert refused[Layout(16, tp=16, ep=1)] == "tp=16 must divide model.n_kv_heads=8"


def test_richest_layout_combines_the_most_kinds() -> None:
    layouts, _ = split_layouts(load_config("qwen3-30b-a3b"), 4)
    assert richest(layouts) == Layout(4, tp=2, ep=2)
    assert richest([Layout(2), Layout(2, ep=2)]) == Layout(2, ep=2)


@pytest.mark.parametrize("name", ["tiny", "qwen3-30b-a3b"])
def test_variants_are_distinct_and_fit_and_cover_every_kind(name: str) -> None:
    cfg = load_config(name, ["parallel.ep_max_load=1.1"])
    small, (layouts, _) = shrink(cfg, 4), split_layouts(cfg, 4)
    variants = list_variants(small, layouts)
    assert len(set(map(str, variants))) == len(variants)
    for variant in variants:
        applied = variant.apply(small)
        assert applied.parallel.ep_chunks == variant.n_chunks
        assert applied.parallel.ep_max_load == (variant.max_load or 1.1)
        assert small.batch_seqs == (
            variant.layout.dp * variant.n_microbatches * applied.train.microbatch_seqs
        )
    fp32 = {v for v in variants if v.precision == "fp32"}
    assert {Variant(layout, stage) for layout in layouts for stage in (1, 2)} <= fp32
    assert {v.layout for v in fp32 if v.sequence_parallel} == {x for x in layouts if x.tp > 1}
    assert {v.n_microbatches for v in fp32} == {1, 2, 4}
    assert {v.recompute for v in fp32} == {"none", "selective", "full"}
    assert {(v.n_chunks > 1, v.max_load is not None) for v in fp32} == {
        (False, False),
        (True, False),
        (False, True),
    }
    in_half = {v.layout for v in variants if v.precision == "bf16"}
    assert in_half == (set(layouts) if cfg.train.precision == "bf16" else set())


def test_an_expert_backend_that_needs_a_gpu_is_replaced_with_a_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = load_config("tiny", ["train.expert_backend=megablocks"])
    small = shrink(cfg, 2)
    print_replaced(cfg, small, Console())
    assert capsys.readouterr().out == "experts by train.expert_backend=auto, because megablocks needs a GPU\n"
    for backend in ("auto", "sorted_loop", "torch_grouped"):
        cfg = load_config("tiny", [f"train.expert_backend={backend}"])
        assert shrink(cfg, 2).train.expert_backend == backend
        print_replaced(cfg, shrink(cfg, 2), Console())
    assert not capsys.readouterr().out
