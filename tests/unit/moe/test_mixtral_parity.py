"""Our logits and gradients against transformers' Mixtral with the same weights."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.assertions import assert_same_grads, relative_error
from tests.models import tiny_config, tiny_decoder
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState

ATTENTION = {part: f"self_attn.{part}_proj.weight" for part in "qkvo"}
NORMS = {"attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"}


def build_mixtral(cfg: ModelConfig) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_expert,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            head_dim=cfg.d_head,
            num_local_experts=cfg.n_experts,
            num_experts_per_tok=cfg.top_k,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            sliding_window=None,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    ).double()


def to_mixtral(ours: dict[str, torch.Tensor], cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Rename our tensors to those of transformers' Mixtral (gate and up fused, experts stacked)."""
    theirs = {
        "model.embed_tokens.weight": ours["embed.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer in range(cfg.n_layers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        for part, name in ATTENTION.items():
            theirs[there + name] = ours[f"{here}attn.{part}.weight"]
        for part, name in NORMS.items():
            theirs[there + name] = ours[f"{here}{part}.weight"]
        theirs[there + "mlp.gate.weight"] = ours[here + "moe.router.weight"]
        experts = here + "moe.experts."
        theirs[there + "mlp.experts.gate_up_proj"] = ours[experts + "gate_up"].transpose(1, 2)
        theirs[there + "mlp.experts.down_proj"] = ours[experts + "down"]
    return theirs


def test_logits_and_gradients_equal_mixtral() -> None:
    cfg = tiny_config(n_experts=12, top_k=3, seq_len=21)
    decoder = tiny_decoder(cfg)
    mixtral = build_mixtral(cfg)
    weights = {name: p.detach() for name, p in decoder.named_parameters()}
    mixtral.load_state_dict(to_mixtral(weights, cfg), strict=True)
    tokens = torch.randint(cfg.vocab_size, (2, 21), generator=torch.Generator().manual_seed(0))
    counted = torch.ones_like(tokens, dtype=torch.bool)
    hidden, _ = decoder(tokens, torch.zeros_like(tokens), counted, RouterState.initial(cfg))
    logits, want = decoder.logits(hidden), mixtral(tokens).logits
    # Mixtral always computes RMSNorm and RoPE in fp32, so fp64 agrees only up to fp32 rounding.
    assert relative_error(logits, want) < 2e-6
    mix = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (logits * mix).sum().backward()
    (want * mix).sum().backward()
    got_grads = to_mixtral({n: p.grad for n, p in decoder.named_parameters()}, cfg)
    assert_same_grads(got_grads, {n: p.grad for n, p in mixtral.named_parameters()}, rtol=5e-5)
