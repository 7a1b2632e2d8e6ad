"""Initial weights depend on the seed and the global name alone."""

import math

import torch

from tests.models import tiny_config
from turnout.moe.init_weights import init_weights
from turnout.moe.model import Decoder, build_decoder
from turnout.moe.parallel.expert_parallel import LocalDispatcher


class HalfOfTheExperts(LocalDispatcher):
    def n_local_experts(self, n_experts: int) -> int:
        return n_experts // 2


def named(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in decoder.named_parameters()}


def test_a_rank_with_half_of_the_experts_starts_from_the_same_weights() -> None:
    cfg = tiny_config()
    whole = build_decoder(cfg)
    init_weights(whole, seed=5)
    half = build_decoder(cfg, dispatcher=HalfOfTheExperts())
    init_weights(half, seed=5, first_expert=3)
    wanted = named(whole)
    for name, value in named(half).items():
        want = wanted[name][3:] if ".experts." in name else wanted[name]
        assert torch.equal(value, want), name


def test_experts_layers_and_seeds_differ() -> None:
    cfg = tiny_config()
    decoder, other = build_decoder(cfg), build_decoder(cfg)
    init_weights(decoder, seed=0)
    init_weights(other, seed=1)
    gate_up = decoder.blocks[0].moe.experts.gate_up
    assert len({expert.sum().item() for expert in gate_up}) == cfg.n_experts
    assert not torch.equal(gate_up, decoder.blocks[1].moe.experts.gate_up)
    assert not torch.equal(gate_up, other.blocks[0].moe.experts.gate_up)


def test_every_parameter_is_filled_with_its_scale() -> None:
    cfg = tiny_config(d_model=64, d_expert=64, n_shared_experts=1, qk_norm=True, n_layers=8)
    decoder = build_decoder(cfg, device="cpu")
    for parameter in decoder.parameters():
        parameter.data.fill_(math.nan)
    init_weights(decoder, seed=0)
    for name, value in named(decoder).items():
        assert torch.isfinite(value).all(), name
        if name.endswith("norm.weight"):
            assert (value == 1).all()
            continue
        want = cfg.init_std / 4 if ".o." in name or "down" in name else cfg.init_std
        # One sigma of a sample's standard deviation is 1 / sqrt(2 n) of it.
        assert abs(value.std().item() / want - 1) < 4 / math.sqrt(2 * value.numel()), name


def test_bf16_is_the_rounded_fp32() -> None:
    cfg = tiny_config()
    full, half = build_decoder(cfg), build_decoder(cfg, dtype=torch.bfloat16)
    init_weights(full, seed=0)
    init_weights(half, seed=0)
    assert all(torch.equal(named(full)[name].bfloat16(), value) for name, value in named(half).items())
