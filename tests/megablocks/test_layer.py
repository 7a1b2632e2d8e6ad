"""The decoder and its expert layer with rows moved by megablocks, against slow twin and reference backend."""

import pytest
import torch
from torch import Tensor

from tests.assertions import assert_same_grads, relative_error
from tests.megablocks.interpreted import interpret_megablocks, skip_elsewhere
from tests.models import decoder_by, random_state, tiny_config
from tests.unit.moe.test_model import VARIANTS, run_fast, run_slow
from turnout.moe.config import ModelConfig
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.expert_parallel import LocalDispatcher
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.recompute import Recompute, RoutingMemo

skip_elsewhere()
RTOL = 1e-5  # of fp32; measured 3e-6
COLLAPSED = 1000.0  # a bias that sends every token of a layer to the same experts
CASES = {name: (VARIANTS[name], 0.05) for name in ("softmax", "not normalised, top 1", "all at once")}
CASES |= {
    "top 5 of 6, uneven": (VARIANTS["top 5 of 6"], 0.3),
    "all to the same": (VARIANTS["softmax"], COLLAPSED),
    "most are dropped": (VARIANTS["capacity"], COLLAPSED),
    "top 8, sigmoid": (tiny_config(n_experts=12, top_k=8, router={"score": "sigmoid"}), 0.05),
}


@pytest.fixture(autouse=True)
def interpreted() -> None:
    interpret_megablocks()


@pytest.mark.parametrize(("cfg", "bias"), CASES.values(), ids=CASES.keys())
def test_decoder_equals_its_slow_twin(cfg: ModelConfig, bias: float) -> None:
    decoder = decoder_by("megablocks", cfg)
    got, stats, got_grads = run_fast(decoder, cfg, bias)
    want, want_grads = run_slow(decoder, cfg, bias)
    assert stats.counts_E.tolist() == want.counts and stats.n_dropped.tolist() == want.n_dropped
    if bias == COLLAPSED:
        assert int((stats.counts_E > 0).sum(1).max()) == cfg.top_k
    assert relative_error(got, want.hidden) <= RTOL
    assert_same_grads(got_grads, want_grads, rtol=RTOL)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_bits(recompute: Recompute) -> None:
    cfg = VARIANTS["all at once"]
    want, _, want_grads = run_fast(decoder_by("megablocks", cfg), cfg, 0.05)
    got, _, got_grads = run_fast(decoder_by("megablocks", cfg, recompute), cfg, 0.05)
    assert torch.equal(got, want)
    assert_same_grads(got_grads, want_grads, rtol=0)


def layer_by(backend: str, cfg: ModelConfig, dtype: torch.dtype) -> MoELayer:
    layer = MoELayer(cfg, LocalDispatcher(), Unsplit(), backend, "none")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype)


# Measured: 3e-8, 1.2e-3 and 0.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=str
)
def test_layer_and_the_gradient_of_its_input(dtype: torch.dtype, rtol: float) -> None:
    cfg = tiny_config(n_experts=7, top_k=3, seq_len=37, n_shared_experts=1)
    results: list[tuple[Tensor, dict[str, Tensor | None]]] = []
    for backend in ("megablocks", "reference"):
        layer, state = layer_by(backend, cfg, dtype), random_state(cfg)
        x = torch.randn(37, cfg.d_model, generator=torch.Generator().manual_seed(5)).to(dtype)
        x.requires_grad_()
        is_counted = torch.ones(37, dtype=torch.bool)
        out, _ = layer(x, state.bias_ME[0], state.load_frac_ME[0], is_counted, RoutingMemo())
        (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)).sum().backward()
        results.append((out, {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}))
    (got, got_grads), (want, want_grads) = results
    assert relative_error(got, want) <= rtol
    assert_same_grads(got_grads, want_grads, rtol=rtol)


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_none_and_one_token(n_tokens: int) -> None:
    cfg = tiny_config()
    x = torch.randn(n_tokens, cfg.d_model, requires_grad=True)
    outs = []
    for backend in ("megablocks", "reference"):
        outs.append(layer_by(backend, cfg, torch.float32).infer(x, torch.zeros(cfg.n_experts)))
        outs[-1].sum().backward()
    assert outs[0].shape == (n_tokens, cfg.d_model)
    assert torch.allclose(*outs, rtol=1e-5)


def test_rows_really_go_through_megablocks() -> None:
    cfg = tiny_config()
    x = torch.randn(3, cfg.d_model, requires_grad=True)
    for backend in ("megablocks", "torch_grouped"):
        layer = layer_by(backend, cfg, torch.float32)
        steps, made_by = set(), [layer.infer(x, torch.zeros(cfg.n_experts)).grad_fn]
        while made_by:
            step = made_by.pop()
            steps.add(type(step).__name__)
            made_by += [before for before, _ in step.next_functions if before is not None]
        theirs = {"GatherOpBackward", "ScatterOpBackward"}
        assert steps & theirs == (theirs if backend == "megablocks" else set())
