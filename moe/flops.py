"""Parameters and FLOPs counted from the sizes alone. The tests hold them against the built model."""

from turnout.moe.config import ModelConfig


def _attention_params(cfg: ModelConfig) -> int:
    projections = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    return projections + (2 * cfg.d_head if cfg.qk_norm else 0)


def _swiglu_params(cfg: ModelConfig, width: int) -> int:
    return 3 * cfg.d_model * width


def n_params(cfg: ModelConfig) -> int:
    """Return the number of trained scalars, embeddings included. The expert bias is state, not a
    parameter.
    """
    return _n_params(cfg, n_routed=cfg.n_experts)


def n_active_params(cfg: ModelConfig) -> int:
    """Return the parameters one token meets: all but the experts it was not routed to, embeddings
    included.
    """
    return _n_params(cfg, n_routed=cfg.top_k)


def _n_params(cfg: ModelConfig, n_routed: int) -> int:
    embeddings = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    every_layer = _attention_params(cfg) + 2 * cfg.d_model
    dense = _swiglu_params(cfg, cfg.d_ff) if cfg.d_ff is not None else 0
    expert_layer = (
        cfg.n_experts * cfg.d_model  # the router sees every expert
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
    """Return FLOPs of one token's forward and backward at seq_len.

    Two FLOPs per multiply-add, backward twice the forward (PaLM, Chowdhery et al. 2022, appendix B). Matrix
    products only: the embedding lookup and the norms are left out. Attention counts the causal half, or the
    window, of a sequence that is one document.
    """
    norms = cfg.d_model * (1 + 2 * cfg.n_layers) + (2 * cfg.d_head * cfg.n_layers if cfg.qk_norm else 0)
    lookup = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model
    matmul_params = n_active_params(cfg) - norms - lookup
    return 6 * matmul_params + int(12 * cfg.n_layers * cfg.n_heads * cfg.d_head * mean_context(cfg))


def mean_context(cfg: ModelConfig) -> float:
    """Return the keys a query sees on average in one full sequence."""
    window = cfg.seq_len if cfg.sliding_window is None else cfg.sliding_window
    warm = window * (window + 1) / 2  # the first `window` queries see 1, 2, ... window keys
    return (warm + (cfg.seq_len - window) * window) / cfg.seq_len
