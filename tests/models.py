"""Tiny models and inputs: odd sizes, large weights, and masks and documents that differ per sequence."""

from typing import Any

import torch
from torch import Tensor

from turnout.moe.config import BalanceConfig, ModelConfig, RouterConfig
from turnout.moe.init_weights import init_weights
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder, build_decoder
from turnout.moe.recompute import Recompute


def tiny_config(
    *, router: dict[str, Any] | None = None, balance: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    sizes: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_head": 6,
        "d_expert": 8,
        "n_experts": 6,
        "top_k": 2,
        "vocab_size": 31,
        "seq_len": 9,
    }
    return ModelConfig(
        **{**sizes, **changes},
        router=RouterConfig(**(router or {})),
        balance=BalanceConfig(**(balance or {})),
    )


def tiny_decoder(
    cfg: ModelConfig,
    *,
    dtype: torch.dtype = torch.float64,
    backend: str = "reference",
    gain: float = 8.0,
    seed: int = 0,
) -> Decoder:
    """Build a decoder with matrices `gain` times the usual, so that the residual hides no other path."""
    decoder = build_decoder(cfg, dtype=dtype, expert_backend=backend)
    init_weights(decoder, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            else:
                parameter.mul_(gain)
    return decoder


def decoder_by(backend: str, cfg: ModelConfig, recompute: Recompute = "none") -> Decoder:
    """Build the tiny decoder in fp32 with an expert backend."""
    decoder = build_decoder(cfg, expert_backend=backend, recompute=recompute)
    decoder.load_state_dict(tiny_decoder(cfg, dtype=torch.float32).state_dict())
    return decoder


def random_state(cfg: ModelConfig, *, bias: float = 0.0, seed: int = 0) -> RouterState:
    generator = torch.Generator().manual_seed(seed)
    shape = (cfg.n_moe_layers, cfg.n_experts)
    load = torch.rand(shape, generator=generator) + 0.1
    return RouterState(bias * torch.randn(shape, generator=generator), load / load.sum(-1, keepdim=True))


def packed_inputs(cfg: ModelConfig, n_seqs: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, doc_ids and is_counted, [n_seqs, seq_len]; sequence i holds i + 1 documents."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_seqs, cfg.seq_len)
    tokens = torch.randint(cfg.vocab_size, shape, generator=generator)
    doc_ids = torch.stack([torch.arange(cfg.seq_len) * (i + 1) // cfg.seq_len for i in range(n_seqs)])
    is_counted = torch.rand(shape, generator=generator) > torch.linspace(0.1, 0.7, n_seqs)[:, None]
    return tokens, doc_ids, is_counted
