"""The decoder: embedding, Pre-LN blocks of attention and feed-forward, final norm, head.

A function of tensors: it knows no process group, no config file and no optimizer. RouterState is what the
routers remember between steps; RouterStats is what they report of this one.

Shapes
  B sequences   S seq_len   T tokens = B*S   D d_model   V vocab_size   M expert layers
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.moe.attention import Attention, Documents, find_documents, rope_tables, takes_any_lengths
from turnout.moe.config import ModelConfig
from turnout.moe.layers import Embedding, Norm, SwiGLU
from turnout.moe.load_balancing import RouterState, RouterStats
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.expert_parallel import Dispatcher, LocalDispatcher
from turnout.moe.parallel.tensor_parallel import TensorParallel, Unsplit
from turnout.moe.recompute import Recompute, RoutingMemo, recompute_if
from turnout.moe.torch_compile import apply_uncompiled


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the feed-forward layer is dense or routed."""

    def __init__(
        self,
        cfg: ModelConfig,
        layer_idx: int,
        dispatcher: Dispatcher,
        tp: TensorParallel,
        expert_backend: str,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        dispatcher, tp = dispatcher.at_layer(layer_idx), tp.at_layer(layer_idx)
        self.attn_norm = Norm(cfg.d_model, cfg.norm_eps, tp, is_partial=tp.splits_tokens)
        self.attn = Attention(cfg, tp, recompute)
        self.ffn_norm = Norm(cfg.d_model, cfg.norm_eps, tp, is_partial=tp.splits_tokens)
        self.ffn: SwiGLU | None = None
        self.moe: MoELayer | None = None
        if cfg.d_ff is not None and layer_idx < cfg.n_dense_layers:
            self.ffn = SwiGLU(cfg.d_model, cfg.d_ff, tp, recompute)
        else:
            self.moe = MoELayer(cfg, dispatcher, tp, expert_backend, recompute)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        documents: Documents,
        state_E: tuple[Tensor, Tensor] | None,
        is_counted_T: Tensor,
        memo: RoutingMemo,
    ) -> tuple[Tensor, RouterStats | None]:
        """Return the block's output, [T, D] as x, and the router's statistics; None in a dense block.

        state_E: bias [E] and load fractions [E] of an expert layer's RouterState
        """
        x = x + self.attn(self.attn_norm(x), rope, documents)
        h = self.ffn_norm(x)
        if self.ffn is not None:
            return x + self.ffn(h), None
        assert self.moe is not None and state_E is not None
        out, stats = self.moe(h, *state_E, is_counted_T, memo)
        return x + out, stats


class Decoder(nn.Module):
    """The whole model, or one rank's part of it."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dispatcher: Dispatcher | None = None,
        tp: TensorParallel | None = None,
        expert_backend: str = "reference",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.cfg, self.recompute, self.is_compiled = cfg, recompute, False
        self.tp = tp = tp or Unsplit()
        dispatcher = dispatcher or LocalDispatcher()
        self.embed = Embedding(cfg.vocab_size, cfg.d_model, tp)
        self.blocks = nn.ModuleList(
            Block(cfg, i, dispatcher, tp, expert_backend, recompute) for i in range(cfg.n_layers)
        )
        self.norm = Norm(cfg.d_model, cfg.norm_eps, tp, is_partial=tp.splits_tokens)
        self.head = None
        if not cfg.tie_embeddings:
            self.head = nn.Linear(cfg.d_model, cfg.vocab_size // tp.size, bias=False)

    def forward(
        self, tokens_BS: Tensor, doc_ids_BS: Tensor, is_counted_BS: Tensor, router_state: RouterState
    ) -> tuple[Tensor, RouterStats]:
        """Return the final hidden states [B, S, D] and the stacked router statistics of the counted tokens.

        tokens_BS      [B, S] int64, S = seq_len
        doc_ids_BS     [B, S] int64 on the CPU; attention never crosses a change of id
        is_counted_BS  [B, S] bool; the other tokens are computed, but enter no statistic
        Raises ValueError if the sequences are not of seq_len tokens.
        """
        n_seqs, seq_len = tokens_BS.shape
        if seq_len != self.cfg.seq_len:
            raise ValueError(
                f"got sequences of {seq_len} tokens, but seq_len={self.cfg.seq_len}; pad or cut them"
            )
        x = self.embed(tokens_BS.flatten())
        is_counted_T = is_counted_BS.flatten()
        by_length = not takes_any_lengths(x.device, x.dtype, self.cfg.d_head)
        documents = find_documents(doc_ids_BS, x.device, by_length=by_length)
        rope = rope_tables(self.cfg, n_seqs, x.device, x.dtype)
        stats: list[RouterStats] = []
        for module in self.blocks:
            block = cast(Block, module)
            state_E = None
            if block.moe is not None:
                state_E = router_state.bias_ME[len(stats)], router_state.load_frac_ME[len(stats)]
            inputs = (x, rope, documents, state_E, is_counted_T, RoutingMemo())
            x, layer_stats = recompute_if(self.recompute == "full", block, *inputs)
            if layer_stats is not None:
                stats.append(layer_stats)
        hidden_TD = self.tp.enter(self.norm(x))
        return hidden_TD.unflatten(0, (n_seqs, seq_len)), RouterStats.stack(stats)

    def compile_blocks(self) -> None:
        """Let torch.compile fuse the operations between matrix products, collectives and attention.

        Another routing or packing needs no new compilation. Compiling needs a compiler and takes seconds, in
        the first step.
        """
        apply_uncompiled()
        self.is_compiled = True
        for block in self.blocks:
            block.compile()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V / tp.size] of hidden states [..., D], for this rank's part of the vocabulary
        and in the dtype of the weights.
        """
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """This rank's part of the head, [V / tp.size, D]; in a tied model, of the embedding."""
        return self.embed.weight if self.head is None else self.head.weight


def build_decoder(
    cfg: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    dispatcher: Dispatcher | None = None,
    tp: TensorParallel | None = None,
    expert_backend: str = "reference",
    recompute: Recompute = "none",
) -> Decoder:
    """Build a decoder with uninitialised weights: call init_weights, or load a state dict."""
    with torch.device("meta"):
        decoder = Decoder(
            cfg, dispatcher=dispatcher, tp=tp, expert_backend=expert_backend, recompute=recompute
        )
    return decoder.to(dtype).to_empty(device=device)
