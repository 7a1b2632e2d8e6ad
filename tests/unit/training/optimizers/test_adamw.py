"""Corner cases of learning-rate schedules, which weights decay, and the engine's AdamW against a formula."""

import math

import pytest
import torch

from tests.assertions import assert_same_tensors
from tests.layouts import build_objective, starting_state, train_on_ranks
from tests.models import tiny_config
from tests.runs import run_config, uneven_batch
from turnout.data.loader import IGNORE_INDEX
from turnout.moe.model import build_decoder
from turnout.training.config.optim import ScheduleConfig
from turnout.training.config.run import RunConfig
from turnout.training.optimizers.adamw import param_groups
from turnout.training.optimizers.schedule import lr_at


def rates(n_steps: int, **schedule: object) -> list[float]:
    checked = ScheduleConfig.model_validate(schedule)
    return [lr_at(step, lr=2.0, schedule=checked, n_steps=n_steps) for step in range(n_steps)]


def test_warmup_rises_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(10, warmup_steps=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_ends_at_final_frac_and_never_rises(kind: str) -> None:
    values = rates(21, kind=kind, warmup_steps=1, final_frac=0.1)
    assert values[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))


def test_middle_of_cosine_and_linear_is_half_way() -> None:
    assert rates(21, kind="cosine", final_frac=0.0)[10] == pytest.approx(1.0)
    assert rates(21, kind="cosine", final_frac=0.0)[5] == pytest.approx(1 + 2**-0.5)
    assert rates(21, kind="linear", final_frac=0.0)[5] == pytest.approx(1.5)


def test_wsd_is_stable_until_the_decay() -> None:
    values = rates(20, kind="wsd", warmup_steps=2, decay_frac=0.25, final_frac=0.0)
    assert values[2:16] == [2.0] * 14
    assert values[15:] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_norms_are_not_decayed_and_every_weight_is_in_one_group() -> None:
    decoder = build_decoder(tiny_config(qk_norm=True, n_shared_experts=1))
    decayed, undecayed = param_groups(decoder.named_parameters(), 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in decoder.named_parameters()}
    assert all(names[id(p)].endswith("norm.weight") for p in undecayed["params"])
    assert not any(names[id(p)].endswith("norm.weight") for p in decayed["params"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)


def adamw_by_hand(cfg: RunConfig, lr: float) -> dict[str, torch.Tensor]:
    """Train by algorithm 2 of Loshchilov and Hutter 2019 (1711.05101), with clipped gradients."""
    objective, state = build_objective(cfg, dtype=torch.float64), starting_state(cfg)
    optim, (beta1, beta2) = cfg.optim, cfg.optim.betas
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in objective.named_parameters()}
    for step in range(1, cfg.train.n_steps + 1):
        batch = uneven_batch(cfg, step - 1)
        objective.zero_grad()
        sums = objective(batch, state)
        (sums.total / (batch.targets != IGNORE_INDEX).sum()).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in objective.parameters()))
        clip = min(1.0, cfg.train.clip_norm / norm)
        with torch.no_grad():
            for name, p in objective.named_parameters():
                gradient, (first, second) = p.grad * clip, moments[name]
                first.mul_(beta1).add_(gradient, alpha=1 - beta1)
                second.mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
                update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + optim.eps)
                decay = 0.0 if name.endswith("norm.weight") else optim.weight_decay
                p.sub_(lr * (update + decay * p))
        state = state.after_step(sums.stats.counts_E, cfg.model.balance)
    return {name: p.detach() for name, p in objective.named_parameters()}


def test_adamw_uses_every_setting_of_the_config(one_rank: None) -> None:
    optim = {"betas": (0.7, 0.85), "eps": 1e-3, "weight_decay": 0.3}
    cfg = run_config(optim=optim, train={"n_steps": 4, "batch_tokens": 96, "microbatch_seqs": 2})
    got = train_on_ranks(0, cfg, 1, optimizer="adamw", lr=0.02)["parameters"]
    assert_same_tensors(got, adamw_by_hand(cfg, lr=0.02), rtol=1e-4)
