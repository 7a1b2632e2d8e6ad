"""The shape of the model: sizes, router and balancing choices, and their validity.

Nothing here knows about ranks, data or optimizers. A wrong value raises pydantic's ValidationError (a
ValueError) with the values and the way out; the caller adds the file or option that set it.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RouterConfig(BaseModel):
    """How a token chooses its experts and how their outputs are weighted."""

    model_config = STRICT

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # divide the top_k weights by their sum
    scale: float = Field(default=1.0, gt=0)
    n_groups: int = Field(default=1, ge=1)  # equal groups of experts with consecutive ids
    top_groups: int = Field(default=1, ge=1)  # a token chooses experts only from its best groups
    capacity_factor: float | None = Field(default=None, gt=0)  # None: dropless


class BalanceConfig(BaseModel):
    """How the experts are kept evenly loaded. Definitions: moe/load_balancing.py."""

    model_config = STRICT

    coef: float = Field(default=0.01, ge=0)
    scope: Literal["sequence", "batch"] = "sequence"
    z_coef: float = Field(default=0.001, ge=0)
    bias_rate: float = Field(default=0.0, ge=0)  # per optimizer step; 0: no bias


class ModelConfig(BaseModel):
    """Sizes of the decoder: n_ for counts, d_ for widths."""

    model_config = STRICT

    n_layers: int = Field(ge=1)
    d_model: int = Field(ge=8)
    n_heads: int = Field(ge=1)
    n_kv_heads: int = Field(ge=1)
    d_head: int = Field(ge=2)
    d_expert: int = Field(ge=8)
    n_experts: int = Field(ge=2)
    top_k: int = Field(ge=1)
    n_shared_experts: int = Field(default=0, ge=0)
    n_dense_layers: int = Field(default=0, ge=0)
    d_ff: int | None = Field(default=None, ge=8)  # of the dense layers only
    vocab_size: int = Field(ge=2)
    seq_len: int = Field(ge=2)
    rope_theta: float = Field(default=10_000.0, gt=1)
    norm_eps: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    qk_norm: bool = False  # RMSNorm over each head's queries and keys
    sliding_window: int | None = Field(default=None, ge=1)  # keys a query sees, itself included; None: all
    tie_embeddings: bool = False
    router: RouterConfig = RouterConfig()
    balance: BalanceConfig = BalanceConfig()

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    @property
    def d_shared(self) -> int:
        """Width of the shared experts, which are one SwiGLU of their joint width."""
        return self.n_shared_experts * self.d_expert

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            fits = [d for d in range(1, self.n_heads + 1) if self.n_heads % d == 0]
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}; use one of {fits}"
            )
        if self.d_head % 2:
            raise ValueError(
                f"d_head={self.d_head} must be even, because RoPE rotates pairs; use {self.d_head + 1}"
            )
        if self.sliding_window is not None and self.sliding_window >= self.seq_len:
            raise ValueError(
                f"sliding_window={self.sliding_window} hides nothing at seq_len={self.seq_len}; "
                "use a smaller window, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.n_dense_layers >= self.n_layers:
            raise ValueError(
                f"n_dense_layers={self.n_dense_layers} leaves no expert layer of n_layers={self.n_layers}; "
                f"use at most {self.n_layers - 1}"
            )
        if self.n_dense_layers and self.d_ff is None:
            raise ValueError(
                f"n_dense_layers={self.n_dense_layers} needs d_ff, the width of the dense layers"
            )
        if not self.n_dense_layers and self.d_ff is not None:
            raise ValueError(
                f"d_ff={self.d_ff} has no effect without dense layers; set n_dense_layers, or drop it"
            )
        return self

    @model_validator(mode="after")
    def _check_routing(self) -> Self:
        router, n_experts, top_k = self.router, self.n_experts, self.top_k
        if top_k > n_experts:
            raise ValueError(f"top_k={top_k} is more than n_experts={n_experts}; use 1 to {n_experts}")
        if top_k == 1 and router.normalize:
            raise ValueError(
                "top_k=1 with router.normalize=true makes every routing weight 1, so the loss teaches the "
                "router nothing; set router.normalize=false"
            )
        if n_experts % router.n_groups:
            fits = [d for d in range(1, n_experts + 1) if n_experts % d == 0]
            raise ValueError(
                f"router.n_groups={router.n_groups} must divide n_experts={n_experts}; use one of {fits}"
            )
        if router.n_groups > 1 and router.top_groups == router.n_groups:
            raise ValueError(
                f"router.top_groups={router.top_groups} of router.n_groups={router.n_groups} lets all "
                "groups compete, so they have no effect; lower router.top_groups, or use router.n_groups=1"
            )
        if router.top_groups > router.n_groups:
            raise ValueError(
                f"router.top_groups={router.top_groups} is more than router.n_groups={router.n_groups}; "
                f"use 1 to {router.n_groups}"
            )
        reachable = router.top_groups * (n_experts // router.n_groups)
        if top_k > reachable:
            raise ValueError(
                f"top_k={top_k} is more than the {reachable} experts of the "
                f"router.top_groups={router.top_groups} groups a token may use; "
                "raise router.top_groups or lower top_k"
            )
        return self
