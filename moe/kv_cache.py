"""Decoding with a cache of keys and values: prompts of any lengths at once, then one token per row.

The forward pass of moe/model.py is the slow twin. It gives the same logits for the same tokens, but computes
seq_len tokens for each new one. Inference is dropless whatever the capacity factor, because which rows a
capacity drops depends on the whole sequence. Without a sliding window a row ends at seq_len positions,
because training saw no later ones. With a window, attention only sees distances below it, so a row has no
end.

Shapes
  B rows   T tokens: of all prompts side by side, or one per row   D d_model   V vocab_size
  H n_heads   G n_kv_heads   A d_head   C slots of a row   N tokens that enter the cache
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.moe.attention import Documents, attend, find_documents, rope_at
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Block, Decoder


@dataclass
class LayerCache:
    """Keys and values of one layer, [B, G, C, A]; None before the first tokens. Position p is in slot p % C.

    Unfilled slots are zero: attention masks them, but a NaN would survive the mask.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    def write(
        self, k_NGA: Tensor, v_NGA: Tensor, rows_N: Tensor, slots_N: Tensor, shape: Sequence[int]
    ) -> None:
        """Fill the slots slots_N of rows rows_N; shape (B, C) is that of the whole cache."""
        if self.keys is None or self.values is None:
            whole = (shape[0], k_NGA.size(1), shape[1], k_NGA.size(2))
            self.keys, self.values = k_NGA.new_zeros(whole), v_NGA.new_zeros(whole)
        self.keys[rows_N, :, slots_N] = k_NGA
        self.values[rows_N, :, slots_N] = v_NGA


@dataclass
class Cache:
    """Keys and values of B rows in every layer. lengths: the tokens of each row, on the host."""

    n_slots: int
    lengths: list[int]
    layers: list[LayerCache]

    def select(self, rows: Sequence[int]) -> "Cache":
        """Return a cache of only these rows, for example without rows that have ended. Rows may repeat."""
        layers = []
        for layer in self.layers:
            assert layer.keys is not None and layer.values is not None
            index = torch.tensor(rows, device=layer.keys.device)
            layers.append(LayerCache(layer.keys.index_select(0, index), layer.values.index_select(0, index)))
        return Cache(self.n_slots, [self.lengths[row] for row in rows], layers)


class Tokens(Protocol):
    """The tokens of one pass: their slots in the cache, and which keys they see."""

    def on(self, device: torch.device) -> Self:
        """Return the same tokens with all tensors on a device."""
        ...

    def attend(self, layer: LayerCache, q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor) -> Tensor:
        """Store keys and values in the layer's cache, and return the attention output [T, H, A]."""
        ...


@dataclass(frozen=True)
class PromptTokens:
    """Whole prompts, side by side, as documents. The last C tokens of each enter the cache.

    kept_N           [N] which tokens of T enter the cache
    rows_N, slots_N  [N] their rows and slots
    shape            (B, C) of the cache
    """

    documents: Documents
    kept_N: Tensor
    rows_N: Tensor
    slots_N: Tensor
    shape: tuple[int, int]
    window: int | None

    @classmethod
    def of(cls, lengths: Sequence[int], n_slots: int, window: int | None) -> "PromptTokens":
        doc_ids_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        position_T = torch.arange(len(doc_ids_T)) - first[doc_ids_T]
        kept_N = (position_T >= torch.tensor(lengths)[doc_ids_T] - n_slots).nonzero().flatten()
        documents = find_documents(doc_ids_T.unsqueeze(0), torch.device("cpu"))
        shape = (len(lengths), n_slots)
        return cls(documents, kept_N, doc_ids_T[kept_N], position_T[kept_N] % n_slots, shape, window)

    def on(self, device: torch.device) -> "PromptTokens":
        if self.kept_N.device == device:
            return self
        order_T, inverse_T = (
            None if x is None else x.to(device) for x in (self.documents.order_T, self.documents.inverse_T)
        )
        return replace(
            self,
            documents=Documents(self.documents.groups, order_T, inverse_T),
            kept_N=self.kept_N.to(device),
            rows_N=self.rows_N.to(device),
            slots_N=self.slots_N.to(device),
        )

    def attend(self, layer: LayerCache, q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor) -> Tensor:
        layer.write(k_TGA[self.kept_N], v_TGA[self.kept_N], self.rows_N, self.slots_N, self.shape)
        return attend(q_THA, k_TGA, v_TGA, self.documents, self.window)


@dataclass(frozen=True)
class NextTokens:
    """One token of each row, T = B.

    slots_B        [B] slots of the new keys and values; once a window has filled the cache, the oldest ones
    n_used         the most slots that any row has filled, this token's included
    is_seen_B11C   [B, 1, 1, n_used] bool, the filled slots of each row; None: all of them
    """

    rows_B: Tensor
    slots_B: Tensor
    n_used: int
    is_seen_B11C: Tensor | None

    @classmethod
    def of(cls, lengths: Sequence[int], n_slots: int) -> "NextTokens":
        n_filled = [min(n + 1, n_slots) for n in lengths]
        n_used, is_seen = max(n_filled), None
        if min(n_filled) < n_used:
            is_seen = (torch.arange(n_used) < torch.tensor(n_filled).unsqueeze(1))[:, None, None]
        return cls(torch.arange(len(lengths)), torch.tensor(lengths) % n_slots, n_used, is_seen)

    def on(self, device: torch.device) -> "NextTokens":
        if self.rows_B.device == device:
            return self
        is_seen = None if self.is_seen_B11C is None else self.is_seen_B11C.to(device)
        return NextTokens(self.rows_B.to(device), self.slots_B.to(device), self.n_used, is_seen)

    def attend(self, layer: LayerCache, q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor) -> Tensor:
        assert layer.keys is not None and layer.values is not None, "a prompt comes first"
        layer.write(k_TGA, v_TGA, self.rows_B, self.slots_B, ())
        keys, values = layer.keys[:, :, : self.n_used], layer.values[:, :, : self.n_used]
        # The heads of a group see the same keys, so they can take the dim of the queries.
        q_BGRA = q_THA.unflatten(1, (keys.size(1), -1))
        out = F.scaled_dot_product_attention(q_BGRA, keys, values, attn_mask=self.is_seen_B11C)
        return out.flatten(1, 2)


class CachedBlock(nn.Module):
    """A block whose attention reads and fills a cache. Its modules are those of the Decoder's block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attn_norm, self.attn, self.ffn_norm = block.attn_norm, block.attn, block.ffn_norm
        self.ffn, self.moe = block.ffn, block.moe

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        bias_E: Tensor | None,
        tokens: Tokens,
        layer: LayerCache,
    ) -> Tensor:
        """Return the block's output [T, D]. bias_E [E]: the router's bias; None in a dense block."""
        qkv = self.attn.project(self.attn_norm(x_TD), rope)
        x_TD = x_TD + self.attn.o(tokens.on(x_TD.device).attend(layer, *qkv).flatten(1))
        h_TD = self.ffn_norm(x_TD)
        if self.ffn is not None:
            out_TD: Tensor = self.ffn(h_TD)
            return x_TD + out_TD
        assert self.moe is not None and bias_E is not None
        return x_TD + self.moe.infer(h_TD, bias_E)


class CachedDecoder(nn.Module):
    """A Decoder with a cache. It shares the decoder's modules, under the same names.

    Each block is one module call, so that accelerate's hooks can move the weights of one block at a time.
    """

    def __init__(self, decoder: Decoder, state: RouterState) -> None:
        super().__init__()
        if decoder.tp.size > 1:
            raise ValueError(
                f"a cache needs the whole decoder, not 1 of {decoder.tp.size} parts; "
                "build it without tensor parallelism"
            )
        self.cfg, self.bias_ME = decoder.cfg, state.bias_ME
        self.embed, self.norm, self.head = decoder.embed, decoder.norm, decoder.head
        self.blocks = nn.ModuleList(CachedBlock(cast(Block, block)) for block in decoder.blocks)

    @property
    def max_positions(self) -> int | None:
        """How many tokens a row may hold; None: any number."""
        return None if self.cfg.sliding_window is not None else self.cfg.seq_len

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], n_positions: int) -> tuple[Tensor, Cache]:
        """Return the logits after each prompt, [B, V], and the cache that extend needs.

        n_positions: the most tokens that a row will hold, its prompt included
        Raises ValueError if the prompts, or n_positions, do not fit.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or not min(lengths) or max(lengths) > n_positions:
            raise ValueError(f"prompts of {lengths} tokens must hold 1 to n_positions={n_positions} tokens")
        if self.max_positions is not None and n_positions > self.max_positions:
            raise ValueError(
                f"n_positions={n_positions} is beyond seq_len={self.max_positions}, and there is no sliding "
                "window; ask for fewer tokens"
            )
        window = self.cfg.sliding_window
        n_slots = n_positions if window is None else min(window, n_positions)
        cache = Cache(n_slots, lengths, [LayerCache() for _ in self.blocks])
        positions_T = torch.cat([torch.arange(n) for n in lengths])
        tokens_T = torch.tensor([token for prompt in prompts for token in prompt])
        hidden_TD = self._hidden(tokens_T, positions_T, PromptTokens.of(lengths, n_slots, window), cache)
        last_B = torch.tensor(lengths).cumsum(0) - 1
        return self._logits(hidden_TD[last_B.to(hidden_TD.device)]), cache

    @torch.no_grad()
    def extend(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Add one token to each row of the cache, and return the logits after it, [B, V].

        Raises ValueError if a row is full.
        """
        is_ring = cache.n_slots == self.cfg.sliding_window
        if max(cache.lengths) >= cache.n_slots and not is_ring:
            raise ValueError(
                f"a row holds {max(cache.lengths)} tokens, and the cache has no room for more; "
                "call prefill with a larger n_positions"
            )
        new = NextTokens.of(cache.lengths, cache.n_slots)
        hidden_BD = self._hidden(torch.tensor(tokens), torch.tensor(cache.lengths), new, cache)
        cache.lengths = [n + 1 for n in cache.lengths]
        return self._logits(hidden_BD)

    def _hidden(self, ids_T: Tensor, positions_T: Tensor, tokens: Tokens, cache: Cache) -> Tensor:
        device = self.embed.weight.device
        x_TD: Tensor = self.embed(ids_T.to(device))
        rope, tokens = rope_at(self.cfg, positions_T.to(device), x_TD.dtype), tokens.on(device)
        n_moe = 0
        for module, layer in zip(self.blocks, cache.layers, strict=True):
            bias_E = None
            if cast(CachedBlock, module).moe is not None:
                bias_E, n_moe = self.bias_ME[n_moe], n_moe + 1
            x_TD = module(x_TD, rope, bias_E, tokens, layer)
        return x_TD.to(device)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(hidden), weight)
