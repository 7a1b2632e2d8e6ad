"""The decoder: embedding, Pre-LN blocks of attention and feed-forward, final norm, head.

A function of tensors: it knows no process group, no config file and no optimizer. What the routers remember
between steps comes in as RouterState and what they learned goes out as RouterStats.

Shapes
  B sequences   S seq_len   T tokens = B*S   D d_model   V vocab_size   M expert layers
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention import Attention, Documents, find_documents, rope_tables
from moe.balance import RouterState, RouterStats
from moe.config import ModelConfig
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.ffn import SwiGLU
from moe.layer import MoELayer


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the feed-forward layer is dense or routed."""

    def __init__(self, cfg: ModelConfig, layer_idx: int, dispatcher: Dispatcher, expert_backend: str) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ffn_norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.ffn: SwiGLU | None = None
        self.moe: MoELayer | None = None
        if cfg.d_ff is not None and layer_idx < cfg.n_dense_layers:
            self.ffn = SwiGLU(cfg.d_model, cfg.d_ff)
        else:
            self.moe = MoELayer(cfg, dispatcher, expert_backend)

    def attend(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        return x_TD + self.attn(self.attn_norm(x_TD), rope, documents)


class Decoder(nn.Module):
    def __init__(
        self, cfg: ModelConfig, dispatcher: Dispatcher | None = None, expert_backend: str = "reference"
    ) -> None:
        super().__init__()
        self.cfg = cfg
        dispatcher = dispatcher or LocalDispatcher()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, i, dispatcher, expert_backend) for i in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(
        self, tokens_BS: Tensor, doc_ids_BS: Tensor, is_counted_BS: Tensor, router_state: RouterState
    ) -> tuple[Tensor, RouterStats]:
        """Return the final hidden states [B, S, D] and the stacked router statistics of the counted tokens.

        tokens_BS      [B, S] int64, S = seq_len
        doc_ids_BS     [B, S] int64 on the CPU; attention never crosses a change of id
        is_counted_BS  [B, S] bool; other tokens are computed but enter no statistic
        """
        n_seqs, seq_len = tokens_BS.shape
        if seq_len != self.cfg.seq_len:
            raise ValueError(
                f"got sequences of {seq_len} tokens, but seq_len={self.cfg.seq_len}; pad or cut them"
            )
        x_TD = self.embed(tokens_BS.flatten())
        is_counted_T = is_counted_BS.flatten()
        documents = find_documents(doc_ids_BS, x_TD.device)
        rope = rope_tables(self.cfg, n_seqs, x_TD.device, x_TD.dtype)
        stats: list[RouterStats] = []
        for module in self.blocks:
            block = cast(Block, module)
            x_TD = block.attend(x_TD, rope, documents)
            h_TD = block.ffn_norm(x_TD)
            if block.ffn is not None:
                x_TD = x_TD + block.ffn(h_TD)
            elif block.moe is not None:
                bias_E, load_frac_E = router_state.bias_ME[len(stats)], router_state.load_frac_ME[len(stats)]
                out_TD, layer_stats = block.moe(h_TD, bias_E, load_frac_E, is_counted_T)
                x_TD = x_TD + out_TD
                stats.append(layer_stats)
        return self.norm(x_TD).unflatten(0, (n_seqs, seq_len)), RouterStats.stack(stats)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., D], in the dtype of the weights."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight)


def build_decoder(
    cfg: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    dispatcher: Dispatcher | None = None,
    expert_backend: str = "reference",
) -> Decoder:
    """Build a decoder with memory for its weights but no values: call init_weights, or load some."""
    with torch.device("meta"):
        decoder = Decoder(cfg, dispatcher, expert_backend)
    return decoder.to(dtype).to_empty(device=device)
