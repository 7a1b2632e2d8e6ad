"""The engine on one rank: what it accumulates and applies, and its check of the first step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.assertions import assert_same_grads, assert_same_tensors
from tests.layouts import LR, build_objective, build_sgd, groups_of, train_on_ranks
from tests.runs import run_config, uneven_batch
from turnout.moe.load_balancing import RouterState
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import put_under_engine
from turnout.training.engine.engine import mark_experts
from turnout.training.engine.first_step_check import FirstStepCheck, ReducedFragment, check_norm
from turnout.training.errors import EngineError
from turnout.training.hardware import cpu_has_fp16
from turnout.training.parallel.layout import Layout
from turnout.training.step import train_step


def config(zero_stage: int = 1, **train: Any) -> RunConfig:
    sizes = {"n_steps": 1, "batch_tokens": 96, "microbatch_seqs": 2}
    return run_config(train={**sizes, **train}, optim={"schedule": {}}, parallel={"zero_stage": zero_stage})


@pytest.fixture(scope="module")
def in_fp32(one_rank: None) -> dict[str, Any]:
    """One step with all sequences in one micro-batch."""
    return train_on_ranks(0, config(microbatch_seqs=8), 1)


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_micro_batches_add_up_in_every_precision(
    precision: str, zero_stage: int, in_fp32: dict[str, Any]
) -> None:
    if precision == "fp16" and not cpu_has_fp16():
        pytest.skip("this CPU has no fp16 arithmetic, so DeepSpeed refuses fp16; tests/gpu tests it on a GPU")
    got = train_on_ranks(0, config(zero_stage, precision=precision), 1)
    # Measured in half precision: norms within 8e-4 of those in fp32.
    rtol_norm, rtol = (1e-6, 1e-5) if precision == "fp32" else (5e-3, 5e-2)
    assert got["norms"] == pytest.approx(in_fp32["norms"], rel=rtol_norm)
    assert_same_grads(got["gradients"], in_fp32["gradients"], rtol=rtol)


def test_without_a_clip_norm_the_whole_gradient_is_applied(one_rank: None) -> None:
    cfg = config(clip_norm=None)
    got = train_on_ranks(0, cfg, 1)
    assert got["norms"][0] > 1
    before = {name: p.detach() for name, p in build_objective(cfg).named_parameters()}
    want = {name: before[name] - LR * gradient for name, gradient in got["gradients"].items()}
    assert_same_tensors(got["parameters"], want, rtol=1e-6)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_dropped_first_step_leaves_no_trace_in_the_second(zero_stage: int, one_rank: None) -> None:
    """The engine checks the first step that it applies, without samples of the steps before it."""
    cfg, groups = config(zero_stage, clip_norm=None), groups_of(Layout(1), 0)
    engine = put_under_engine(build_objective(cfg, groups), cfg, groups, build_sgd)
    state, before = RouterState.initial(cfg.model), engine.master_weights()
    for step, is_wanted in ((0, False), (1, True)):
        microbatches = split_microbatches(uneven_batch(cfg, step), cfg.train.microbatch_seqs)
        result = train_step(
            engine,
            microbatches,
            state,
            step=step,
            lr=LR,
            groups=groups,
            is_wanted=lambda _, answer=is_wanted: answer,
        )
        assert result.outcome.was_applied == is_wanted
    after = engine.master_weights()
    engine.close()
    assert_same_tensors(after, plain_step(cfg, step=1), rtol=1e-6)
    assert not any(torch.equal(after[name], before[name]) for name in before)


def plain_step(cfg: RunConfig, *, step: int) -> dict[str, Tensor]:
    """Return the parameters after plain SGD on the batch of a step, without clipping."""
    objective, batch = build_objective(cfg), uneven_batch(cfg, step)
    n_tokens = (batch.targets >= 0).sum()
    (objective(batch, RouterState.initial(cfg.model)).total / n_tokens).backward()
    return {name: p.detach() - LR * p.grad for name, p in objective.named_parameters()}


def test_experts_get_groups_of_their_own_and_keep_their_weight_decay(one_rank: None) -> None:
    """Experts with and without weight decay, and other parameters, are each in one group."""
    objective = build_objective(config())
    named = dict(objective.named_parameters())
    is_decayed = {name: "down" in name or "embed" in name for name in named}
    groups = [
        {"params": [named[n] for n in named if is_decayed[n]], "weight_decay": 0.25},
        {"params": [named[n] for n in named if not is_decayed[n]], "weight_decay": 0.0},
    ]
    split = mark_experts(objective, groups, groups_of(Layout(1), 0))
    names = {id(parameter): name for name, parameter in named.items()}
    found = {names[id(p)]: (g["weight_decay"], g.get("moe", False)) for g in split for p in g["params"]}
    assert sum(len(group["params"]) for group in split) == len(found)
    assert found == {n: (0.25 if is_decayed[n] else 0.0, ".experts." in n) for n in named}
    assert [n for n, p in named.items() if not getattr(p, "allreduce", True)] == [
        n for n in named if ".experts." in n
    ]


# The check of the first step, on a layer without an engine


class CheckedLayer:
    """A layer of 5 x 40 weights, after two backward passes that the check has sampled."""

    def __init__(self) -> None:
        self.module = nn.Linear(40, 5, bias=False)
        self.check = FirstStepCheck(self.module, groups_of(Layout(1), 0), has_expert_groups=False)
        self.generator = torch.Generator().manual_seed(0)
        self.gradient = torch.zeros(5 * 40)
        for _ in range(2):
            self.gradient += self.backward()

    def backward(self) -> Tensor:
        """Return the gradient of one backward pass."""
        self.module.weight.grad = None
        x = torch.randn(7, 40, generator=self.generator)
        self.module(x).square().sum().backward()
        return self.module.weight.grad.flatten()

    def fragments(self, gradient: Tensor) -> list[ReducedFragment]:
        """Return a gradient [200] in two parts; the first ends within a row."""
        return [
            ReducedFragment("weight", 0, gradient[:73]),
            ReducedFragment("weight", 73, gradient[73:]),
        ]


def test_the_check_accepts_the_sum_of_all_backward_passes_and_its_norm(one_rank: None) -> None:
    layer = CheckedLayer()
    fragments = layer.fragments(layer.gradient)
    layer.check.check_gradients(fragments)
    norm = float(layer.check.norm(fragments))
    assert norm == pytest.approx(float(layer.gradient.square().sum().sqrt()), rel=1e-6)
    check_norm(norm * 1.0009, norm)
    for factor in (0.5, 0.99, 1.01, 2.0):
        with pytest.raises(EngineError, match="the reduced gradient's is"):
            check_norm(norm * factor, norm)


@pytest.mark.parametrize("part", [0, 1], ids=["first part", "second part"])
def test_the_check_finds_a_wrong_part(part: int, one_rank: None) -> None:
    layer = CheckedLayer()
    fragments = layer.fragments(layer.gradient.clone())
    fragments[part].values.mul_(1.01)
    with pytest.raises(
        EngineError, match=r"gradient of weight differs .* \(on rank 0\); nothing was applied"
    ):
        layer.check.check_gradients(fragments)


def test_the_check_discards_samples_at_a_restart_and_takes_none_after_it_is_closed(one_rank: None) -> None:
    layer = CheckedLayer()
    layer.check.restart()
    alone = layer.backward()
    layer.check.check_gradients(layer.fragments(alone))
    layer.check.close()
    layer.backward()
    layer.check.check_gradients(layer.fragments(alone))
