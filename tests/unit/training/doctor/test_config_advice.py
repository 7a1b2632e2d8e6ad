"""Each rule on a config fires when it should and not otherwise."""

from typing import Any

import pytest

from turnout.launch.settings import check_config, load_config, recipe_names
from turnout.training.doctor.config_advice import lint

# A config that needs no advice: 30 GFLOPs per token, 1 T tokens.
CLEAN: dict[str, Any] = {
    "model.n_layers": 24,
    "model.d_model": 2048,
    "model.n_heads": 16,
    "model.n_kv_heads": 8,
    "model.d_head": 128,
    "model.d_expert": 1024,
    "model.n_experts": 64,
    "model.top_k": 8,
    "model.vocab_size": 65536,
    "model.seq_len": 4096,
    "model.balance.coef": 0.01,
    "train.n_steps": 250_000,
    "train.batch_tokens": 4_194_304,
    "train.microbatch_seqs": 1,
    "train.precision": "bf16",
    "train.clip_norm": 1.0,
    "optim.lr": 4e-4,
    "optim.schedule.warmup_steps": 2000,
    "data.corpus": "unused",
    "eval.every_steps": 5000,
    "checkpoint.every_steps": 1000,
}
BIAS = {"model.balance.coef": 1e-4, "model.balance.bias_rate": 1e-3, "model.router.score": "sigmoid"}

# rule -> settings with which it fires, similar settings with which it does not
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no-balancing": ({"model.balance.coef": 0.0}, {**BIAS, "model.balance.coef": 0.0}),
    "strong-balancing": ({"model.balance.coef": 0.2}, {"model.balance.coef": 0.1}),
    "two-balancings": ({**BIAS, "model.balance.coef": 0.01}, BIAS),
    "large-bias-rate": ({**BIAS, "model.router.score": "softmax", "model.balance.bias_rate": 2e-3}, BIAS),
    "no-z-loss": ({"model.balance.z_coef": 0.0}, {"model.balance.z_coef": 0.0, "train.precision": "fp32"}),
    "noisy-loads": (
        {"model.balance.scope": "batch", "train.batch_tokens": 4096, "model.n_experts": 1024},
        {"model.balance.scope": "batch", "train.batch_tokens": 8192, "model.n_experts": 1024},
    ),
    "short-sequences": (
        {"model.seq_len": 32, "train.microbatch_seqs": 128},
        {"model.seq_len": 32, "train.microbatch_seqs": 128, "model.balance.scope": "batch"},
    ),
    "unnormalised-sigmoid": (
        {"model.router.score": "sigmoid", "model.router.normalize": False},
        {"model.router.score": "sigmoid", "model.router.normalize": False, "model.top_k": 1},
    ),
    "capacity-below-one": (
        {"model.router.capacity_factor": 0.9},
        {"model.router.capacity_factor": 1.0},
    ),
    "capacity-without-effect": (
        {"model.router.capacity_factor": 8.0},
        {"model.router.capacity_factor": 7.9},
    ),
    "every-expert": ({"model.top_k": 64}, {"model.top_k": 63}),
    "loud-initialisation": ({"model.init_std": 0.1}, {"model.init_std": 0.05}),
    "no-clipping": ({"train.clip_norm": None}, {"train.clip_norm": 10.0}),
    "slow-second-moment": (
        {"optim.betas": [0.9, 0.999]},
        {"optim.betas": [0.9, 0.999], "train.batch_tokens": 262_144},
    ),
    "no-weight-decay": ({"optim.weight_decay": 0.0}, {"optim.weight_decay": 0.01}),
    "large-eps": ({"optim.eps": 1e-5}, {"optim.eps": 1e-8}),
    "fp16": ({"train.precision": "fp16"}, {"train.precision": "bf16"}),
    "short-warmup": ({"optim.schedule.warmup_steps": 39}, {"optim.schedule.warmup_steps": 40}),
    "little-decay": ({"optim.schedule.final_frac": 0.5}, {"optim.schedule.final_frac": 0.3}),
    "short-decay": (
        {"optim.schedule.kind": "wsd", "optim.schedule.decay_frac": 0.02},
        {"optim.schedule.kind": "wsd", "optim.schedule.decay_frac": 0.1},
    ),
    "high-lr": ({"optim.lr": 3e-3}, {"optim.lr": 1e-3}),
    "low-lr": ({"optim.lr": 1e-5}, {"optim.lr": 1e-4}),
    "large-batch": (
        {"train.batch_tokens": 2**24, "train.n_steps": 1000, "optim.schedule.warmup_steps": 100},
        {"train.batch_tokens": 2**22, "train.n_steps": 4000, "optim.schedule.warmup_steps": 100},
    ),
    "late-evaluation": ({"eval.every_steps": None}, {"eval.every_steps": None, "train.n_steps": 10_000}),
    "no-checkpoints": (
        {"checkpoint.every_steps": None},
        {"checkpoint.every_steps": None, "train.n_steps": 1000, "optim.schedule.warmup_steps": 100},
    ),
    "short-timeout": ({"parallel.timeout_s": 30}, {"parallel.timeout_s": 60}),
    "fp32": ({"train.precision": "fp32"}, {"train.precision": "fp32", "model.n_layers": 1}),
    "vocab-tile": ({"model.vocab_size": 50257}, {"model.vocab_size": 50304}),
    "experts-per-node": ({"model.n_experts": 60}, {"model.n_experts": 72}),
    "d-model-tile": (
        {"model.d_model": 2080},
        {"model.d_model": 2080, "train.precision": "fp32"},
    ),
    "d-expert-tile": ({"model.d_expert": 1000}, {"model.d_expert": 896}),
    "slow-attention": ({"model.d_head": 100}, {"model.d_head": 96}),
    "slow-experts": (
        {"train.expert_backend": "reference"},
        {"train.expert_backend": "sorted_loop"},
    ),
    "no-sequence-parallel": (
        {"parallel.tp": 2},
        {"parallel.tp": 2, "parallel.sequence_parallel": True},
    ),
    "thin-experts": (
        {"model.n_experts": 1024, "model.balance.scope": "batch"},
        {"model.n_experts": 1024, "model.balance.scope": "batch", "parallel.ep": 8},
    ),
}


def rules_of(changes: dict[str, Any]) -> list[str]:
    tree: dict[str, Any] = {}
    for path, value in {**CLEAN, **changes}.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return [advice.rule for advice in lint(check_config(tree, "test"))]


def test_a_sound_config_needs_no_advice() -> None:
    assert rules_of({}) == []


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_fires_at_its_settings_and_not_at_similar_ones(rule: str) -> None:
    wrong, right = CASES[rule]
    assert rule in rules_of(wrong)
    assert rule not in rules_of(right)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_clean(name: str) -> None:
    assert lint(load_config(name)) == []


def test_advice_has_value_reason_and_remedy_and_warnings_come_first() -> None:
    cfg = load_config("small", ["train.clip_norm=none", "model.vocab_size=32769", "optim.weight_decay=0.0"])
    advice = lint(cfg)
    assert [one.severity for one in advice] == ["warning", "warning", "note"]
    assert [(one.path, one.value) for one in advice] == [
        ("train.clip_norm", None),
        ("optim.weight_decay", 0.0),
        ("model.vocab_size", 32769),
    ]
    assert all(one.reason and one.remedy for one in advice)


def test_every_rule_has_a_case() -> None:
    fired = {rule for wrong, _ in CASES.values() for rule in rules_of(wrong)}
    assert fired == set(CASES)
