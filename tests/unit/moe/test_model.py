"""The decoder against its slow twin: outputs, statistics and every gradient, in fp64."""

import pytest
import torch

from tests.assertions import assert_same_grads, relative_error
from tests.models import packed_inputs, random_state, tiny_config, tiny_decoder
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterStats
from turnout.moe.model import Decoder
from turnout.moe.reference import ReferenceOutput, reference_forward

VARIANTS = {
    "softmax": tiny_config(),
    "not normalised, top 1": tiny_config(top_k=1, router={"normalize": False}),
    "top 5 of 6": tiny_config(top_k=5),
    "sigmoid, scaled": tiny_config(router={"score": "sigmoid", "scale": 2.5}),
    "groups": tiny_config(top_k=3, router={"n_groups": 3, "top_groups": 2}),
    "capacity": tiny_config(router={"capacity_factor": 0.75}),
    "batch scope": tiny_config(balance={"scope": "batch"}),
    "dense first, shared": tiny_config(n_layers=3, n_dense_layers=1, d_ff=24, n_shared_experts=2),
    "multi-head, qk-norm": tiny_config(n_kv_heads=4, qk_norm=True),
    "sliding window": tiny_config(sliding_window=2),
    "tied": tiny_config(tie_embeddings=True),
    "all at once": tiny_config(
        n_layers=3,
        n_dense_layers=1,
        d_ff=24,
        n_shared_experts=1,
        qk_norm=True,
        sliding_window=4,
        router={"score": "sigmoid", "scale": 1.5, "n_groups": 3, "top_groups": 2, "capacity_factor": 1.0},
        balance={"scope": "batch"},
    ),
}


def objective(hidden: torch.Tensor, balance: torch.Tensor, z: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """Mix all outputs with unequal weights, so that each carries gradient."""
    logits = decoder.logits(hidden)
    mix = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits.square() * mix).sum() + 0.3 * balance.sum() + 0.01 * z.sum()


def run_fast(decoder: Decoder, cfg: ModelConfig, bias: float) -> tuple[torch.Tensor, RouterStats, dict]:
    hidden, stats = decoder(*packed_inputs(cfg), random_state(cfg, bias=bias))
    decoder.zero_grad()
    objective(hidden, stats.balance_sum, stats.z_sum, decoder).backward()
    return hidden, stats, {n: p.grad.clone() for n, p in decoder.named_parameters()}


def run_slow(decoder: Decoder, cfg: ModelConfig, bias: float) -> tuple[ReferenceOutput, dict]:
    out = reference_forward(
        dict(decoder.named_parameters()), cfg, *packed_inputs(cfg), random_state(cfg, bias=bias)
    )
    decoder.zero_grad()
    objective(out.hidden, torch.stack(out.balance_sums), torch.stack(out.z_sums), decoder).backward()
    return out, {n: p.grad.clone() for n, p in decoder.named_parameters()}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_decoder_equals_its_slow_twin(cfg: ModelConfig) -> None:
    decoder = tiny_decoder(cfg)
    hidden, stats, grads = run_fast(decoder, cfg, bias=0.2)
    want, want_grads = run_slow(decoder, cfg, bias=0.2)
    assert relative_error(hidden, want.hidden) < 1e-10
    assert relative_error(stats.balance_sum, torch.stack(want.balance_sums)) < 1e-10
    assert relative_error(stats.z_sum, torch.stack(want.z_sums)) < 1e-10
    assert stats.counts_E.tolist() == want.counts
    assert stats.n_dropped.tolist() == want.n_dropped
    assert_same_grads(grads, want_grads, rtol=1e-9)


def test_capacity_variant_drops_rows() -> None:
    cfg = VARIANTS["capacity"]
    _, stats, _ = run_fast(tiny_decoder(cfg), cfg, bias=0.2)
    assert stats.n_dropped.sum() > 0


def test_adversarial_router_sends_every_token_to_the_same_experts() -> None:
    cfg = tiny_config(router={"normalize": False})
    decoder = tiny_decoder(cfg)
    with torch.no_grad():
        for block in decoder.blocks:
            block.moe.router.weight.mul_(0.01)
    state = random_state(cfg)
    state.bias_ME[:, [1, 4]] = 10.0  # two experts take all, four get no row
    inputs = packed_inputs(cfg)
    hidden, stats = decoder(*inputs, state)
    want = reference_forward(dict(decoder.named_parameters()), cfg, *inputs, state)
    assert relative_error(hidden, want.hidden) < 1e-10
    assert (stats.counts_E > 0).tolist() == [[False, True, False, False, True, False]] * 2
    hidden.square().sum().backward()
    idle = decoder.blocks[0].moe.experts.gate_up.grad[[0, 2, 3, 5]]
    assert not idle.any(), "an expert without rows must have a zero gradient, not a missing one"


def test_nothing_leaks_across_documents_or_from_the_future() -> None:
    cfg = tiny_config()
    decoder = tiny_decoder(cfg)
    tokens, doc_ids, is_counted = packed_inputs(cfg, n_seqs=2)
    state = random_state(cfg)
    before, _ = decoder(tokens, doc_ids, is_counted, state)
    boundary = int((doc_ids[1] == 0).sum())
    changed = tokens.clone()
    changed[1, boundary - 1] = (changed[1, boundary - 1] + 1) % cfg.vocab_size
    after, _ = decoder(changed, doc_ids, is_counted, state)
    moved = (after - before).abs().amax(-1) > 1e-9  # rounding differs by how rows are tiled
    assert moved[1, boundary - 1]
    moved[1, boundary - 1] = False
    assert not moved.any()


def test_masked_tokens_enter_no_statistic() -> None:
    cfg = tiny_config()
    decoder = tiny_decoder(cfg)
    tokens, doc_ids, _ = packed_inputs(cfg)
    none_counted = torch.zeros_like(tokens, dtype=torch.bool)
    _, stats = decoder(tokens, doc_ids, none_counted, random_state(cfg))
    assert not stats.counts_E.any()
    assert not stats.balance_sum.any() and not stats.z_sum.any() and not stats.entropy_sum.any()


def test_wrong_sequence_length_is_refused() -> None:
    cfg = tiny_config()
    tokens, doc_ids, is_counted = (x[:, :5] for x in packed_inputs(cfg))
    with pytest.raises(ValueError, match="seq_len=9"):
        tiny_decoder(cfg)(tokens, doc_ids, is_counted, random_state(cfg))
