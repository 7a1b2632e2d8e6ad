"""Parameters and FLOPs by formula against the built model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import tiny_config, tiny_decoder
from turnout.moe.config import ModelConfig
from turnout.moe.flops import flops_per_token, mean_context, n_active_params, n_params
from turnout.moe.load_balancing import RouterState

CONFIGS = {
    "plain": tiny_config(),
    "tied, qk-norm": tiny_config(tie_embeddings=True, qk_norm=True),
    "dense first, shared": tiny_config(n_layers=3, n_dense_layers=2, d_ff=40, n_shared_experts=2),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameter_counts_equal_the_built_model(cfg: ModelConfig) -> None:
    named = dict(tiny_decoder(cfg).named_parameters())
    assert n_params(cfg) == sum(p.numel() for p in named.values())
    routed = sum(p.numel() for name, p in named.items() if ".experts." in name)
    assert routed > 0
    assert n_active_params(cfg) == n_params(cfg) - routed * (cfg.n_experts - cfg.top_k) // cfg.n_experts


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_flops_equal_those_counted_in_a_forward_pass(cfg: ModelConfig) -> None:
    decoder = tiny_decoder(cfg, dtype=torch.float32)
    shape = (2, cfg.seq_len)
    tokens = torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        hidden, _ = decoder(
            tokens, torch.zeros_like(tokens), torch.ones(shape, dtype=torch.bool), RouterState.initial(cfg)
        )
        decoder.logits(hidden)
    # The plain attention kernel computes the whole square; the formula counts only visible keys.
    square = 4 * cfg.n_layers * cfg.n_heads * cfg.d_head * cfg.seq_len
    seen = 4 * cfg.n_layers * cfg.n_heads * cfg.d_head * mean_context(cfg)
    counted = counter.get_total_flops() / tokens.numel() - square
    assert flops_per_token(cfg) / 3 == pytest.approx(counted + seen, rel=1e-9)


def test_mean_context_of_a_window() -> None:
    cfg = tiny_config(seq_len=10, sliding_window=4)
    assert mean_context(cfg) == pytest.approx(sum(min(i + 1, 4) for i in range(10)) / 10)
    assert mean_context(tiny_config(seq_len=10)) == pytest.approx(5.5)
