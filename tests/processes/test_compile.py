"""Compiled blocks: the same results as eager ones, and no new graph for another routing or packing."""

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from tests.assertions import assert_same_grads, relative_error
from tests.models import random_state, tiny_config, tiny_decoder
from tests.unit.moe.experts.test_experts import COUNTS, RTOL, apply, check_backend, check_gradients, leaves
from tests.unit.training.test_linear_cross_entropy import T, check_loss
from turnout.moe.config import ModelConfig
from turnout.moe.experts.sorted_loop import compiled_loop_experts
from turnout.moe.experts.swiglu import compiled_swiglu
from turnout.moe.model import Decoder, build_decoder
from turnout.moe.recompute import Recompute

VARIANTS = {
    "softmax": tiny_config(),
    "sigmoid, shared, dense first, window, qk-norm": tiny_config(
        n_layers=3,
        n_dense_layers=1,
        d_ff=24,
        n_shared_experts=1,
        sliding_window=7,
        qk_norm=True,
        router={"score": "sigmoid", "scale": 1.5},
        balance={"coef": 0.5, "bias_rate": 0.01},
    ),
    "capacity": tiny_config(router={"capacity_factor": 1.0}),
}


def build(cfg: ModelConfig, recompute: Recompute, dtype: torch.dtype) -> Decoder:
    decoder = build_decoder(cfg, dtype=dtype, expert_backend="sorted_loop", recompute=recompute)
    decoder.load_state_dict(tiny_decoder(cfg, dtype=dtype).state_dict())
    return decoder


def run(decoder: Decoder, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return the logits of random documents, which differ by seed, and all gradients."""
    cfg, generator = decoder.cfg, torch.Generator().manual_seed(seed)
    shape = (3, cfg.seq_len)
    tokens = torch.randint(cfg.vocab_size, shape, generator=generator)
    doc_ids = (torch.rand(shape, generator=generator) < 0.2).cumsum(1)
    is_counted = torch.rand(shape, generator=generator) < 0.8
    hidden, stats = decoder(tokens, doc_ids, is_counted, random_state(cfg))
    logits = decoder.logits(hidden)
    mix = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    decoder.zero_grad()
    ((logits * mix).sum() + 0.1 * stats.balance_sum.sum() + 0.01 * stats.z_sum.sum()).backward()
    return logits.detach(), {name: p.grad for name, p in decoder.named_parameters()}


def test_all_blocks_share_one_graph() -> None:
    """torch.compile gives up on a function that it has compiled eight times; this model has more blocks."""
    torch._dynamo.reset()
    decoder = build(tiny_config(n_layers=12), "none", torch.float32)
    decoder.compile_blocks()
    counters.clear()
    with dynamo_config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
        run(decoder, seed=0)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.long), "full"])
@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_compiled_blocks_equal_eager_ones_with_one_graph_for_any_routing(
    cfg: ModelConfig, recompute: Recompute
) -> None:
    torch._dynamo.reset()
    dtype = torch.float64
    eager, compiled = build(cfg, recompute, dtype), build(cfg, recompute, dtype)
    compiled.compile_blocks()
    counters.clear()
    run(compiled, seed=0)
    assert counters["stats"]["unique_graphs"] > 0
    with dynamo_config.patch(error_on_recompile=True):
        for seed in range(1, 5):
            got, got_grads = run(compiled, seed)
            want, want_grads = run(eager, seed)
            assert relative_error(got, want) <= 1e-10
            assert_same_grads(got_grads, want_grads, rtol=1e-10)


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_compiled_loop_equals_the_reference(counts: list[int], dtype: torch.dtype) -> None:
    check_backend("compiled_loop", counts, dtype)


def test_the_compiled_loop_passes_gradcheck() -> None:
    check_gradients(compiled_loop_experts)


def test_the_activation_is_compiled_once_for_any_number_of_rows() -> None:
    counters.clear()
    torch._dynamo.reset()
    compiled_swiglu.cache_clear()
    for n_rows in (40, 37, 3, 101):
        tensors = leaves([n_rows, 0, 2, 0, 0], torch.float32)
        apply(compiled_loop_experts, [n_rows, 0, 2, 0, 0], tensors).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2, "one forward, one backward"


@pytest.mark.parametrize("n_at_once", [1, 5, T, 1000])
def test_the_compiled_loss_equals_that_of_logits(n_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_loss(n_at_once, monkeypatch, compiles=True)
