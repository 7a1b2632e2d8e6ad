"""Parameters and FLOPs counted from the sizes alone. Tests compare them with the built model."""

from turnout.moe.config import ModelConfig


def _attention_params(cfg: ModelConfig) -> int:
    projections = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    return projections + (2 * cfg.d_head if cfg.qk_norm else 0)


def _swiglu_params(cfg: ModelConfig, width: int) -> int:
    return 3 * cfg.d_model * width


def n_params(cfg: ModelConfig) -> int:
    """Return the number of parameters, embeddings included. The router's bias is state, not a parameter."""
    return _n_params(cfg, n_routed=cfg.n_experts)


def n_active_params(cfg: ModelConfig) -> int:
    """Return the number of parameters that one token uses, embeddings included: all but the experts that it
    is not routed to.
    """
    return _n_params(cfg, n_routed=cfg.top_k)


def _n_params(cfg: ModelConfig, n_routed: int) -> int:
    embeddings = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    every_layer = _attention_params(cfg) + 2 * cfg.d_model
    dense = _swiglu_params(cfg, cfg.d_ff) if cfg.d_ff is not None else 0
    expert_layer = (
        cfg.n_experts * cfg.d_model  # the router scores every expert
        + n_routed * _swiglu_params(cfg, cfg.d_expert)
        + _swiglu_params(cfg, cfg.d_shared)
    )
    return (
        embeddings
        + cfg.d_model  # final norm
        + cfg.n_layers * every_layer
        + cfg.n_dense_layers * dense
        + cfg.n_moe_layers * expert_layer
    )


def flops_per_token(cfg: ModelConfig) -> int:
    """Return the FLOPs of one token's forward and backward pass at seq_len.

    A multiply-add is two FLOPs, and backward takes twice as many as forward (PaLM, Chowdhery et al. 2022,
    appendix B). Only matrix products count, not the embedding lookup or norms. Attention counts the causal
    half, or the window, of a sequence that is one document.
    """
    norms = cfg.d_model * (1 + 2 * cfg.n_layers) + (2 * cfg.d_head * cfg.n_layers if cfg.qk_norm else 0)
    lookup = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model
    matmul_params = n_active_params(cfg) - norms - lookup
    return 6 * matmul_params + int(12 * cfg.n_layers * cfg.n_heads * cfg.d_head * mean_context(cfg))


def mean_context(cfg: ModelConfig) -> float:
    """Return the mean number of keys that a query sees in one full sequence."""
    window = cfg.seq_len if cfg.sliding_window is None else cfg.sliding_window
    warm = window * (window + 1) / 2  # the first `window` queries see 1, 2, ... window keys
    return (warm + (cfg.seq_len - window) * window) / cfg.seq_len
