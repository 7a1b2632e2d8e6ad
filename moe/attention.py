"""Grouped-query attention with RoPE over packed documents.

Shapes
  B sequences   S seq_len   T tokens = B*S   D d_model   H n_heads   G n_kv_heads   A d_head   W
  sliding_window   N documents

A batch is a flat row of T tokens, and attention never crosses a document. From sm_80 on, in half precision,
one call of FlashAttention (Dao 2023, 2307.08691) computes documents of all lengths. Elsewhere, documents of
equal length share a call of scaled_dot_product_attention. No device ever builds a mask of S x S.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.moe.config import ModelConfig
from turnout.moe.experts.permute import invert, permute_rows
from turnout.moe.layers import Norm
from turnout.moe.parallel.tensor_parallel import TensorParallel
from turnout.moe.recompute import Recompute, recompute_if
from turnout.moe.torch_compile import uncompiled


@dataclass(frozen=True)
class Documents:
    """The N documents of one packed batch, grouped by length or all together.

    groups     (length, number of documents) in the order in which order_T lists their tokens; with
               cu_seqlens in any order
    order_T    [T] token positions, documents of equal length side by side; None: the batch is in that order
    inverse_T  [T] the inverse of order_T
    cu_seqlens  [N + 1] int32, the start of each document, then T; None: one call of attention for each length
    """

    groups: tuple[tuple[int, int], ...]
    order_T: Tensor | None
    inverse_T: Tensor | None
    cu_seqlens: Tensor | None = None

    @property
    def max_length(self) -> int:
        return max(length for length, _ in self.groups)


def takes_any_lengths(device: torch.device, dtype: torch.dtype, d_head: int) -> bool:
    """Return whether FlashAttention's kernel for documents of any lengths runs on this device."""
    if device.type != "cuda":
        return False
    return has_varlen_kernel(torch.cuda.get_device_capability(device), dtype, d_head)


def has_varlen_kernel(capability: tuple[int, int], dtype: torch.dtype, d_head: int) -> bool:
    """Return whether GPUs of a compute capability run the kernel, forward and backward.

    For d_head above 192, its backward pass needs the shared memory of the large chips.
    """
    if dtype.itemsize != 2 or d_head % 8 or d_head > 256 or capability < (8, 0):
        return False
    return d_head <= 192 or capability in ((8, 0), (9, 0), (10, 0))


def find_documents(doc_ids_BS: Tensor, device: torch.device, *, by_length: bool = True) -> Documents:
    """Find the documents of a packed batch.

    doc_ids_BS [B, S] int64 on the CPU: the id changes where a new document starts. The end of a sequence
    also ends its document. This runs on the host, so that lengths are Python ints, without a device sync.
    by_length: group documents by length, for kernels that take one length per call
    """
    n_seqs, seq_len = doc_ids_BS.shape
    is_start_BS = torch.ones_like(doc_ids_BS, dtype=torch.bool)
    is_start_BS[:, 1:] = doc_ids_BS[:, 1:] != doc_ids_BS[:, :-1]
    starts = is_start_BS.flatten().nonzero().flatten()
    end = torch.tensor([n_seqs * seq_len])
    lengths = torch.diff(starts, append=end)
    distinct, n_documents = lengths.unique(return_counts=True)
    groups = tuple(zip(distinct.tolist(), n_documents.tolist(), strict=True))
    if not by_length:
        return Documents(groups, None, None, torch.cat([starts, end]).to(device, torch.int32))
    if len(groups) == 1:
        return Documents(groups, None, None)
    order_T = torch.cat([(starts[lengths == n, None] + torch.arange(n)).flatten() for n, _ in groups])
    return Documents(groups, order_T.to(device), invert(order_T).to(device))


def rope_tables(
    cfg: ModelConfig, n_seqs: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [T, 1, A/2], in fp32 or wider (Su et al. 2021, section 3.4.2).

    Positions count from the start of the sequence. A document that starts in the middle needs no reset,
    because attention depends only on differences of positions.
    """
    return rope_at(cfg, torch.arange(cfg.seq_len, device=device).repeat(n_seqs), dtype)


def rope_at(cfg: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of these positions, each [T, 1, A/2], in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, cfg.d_head, 2, device=positions_T.device, dtype=wide) / cfg.d_head
    frequencies = 1.0 / cfg.rope_theta**exponents
    angles = torch.outer(positions_T.to(wide), frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()


def apply_rope(x_THA: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + A/2) of each head: the half-split convention of Hugging Face."""
    first, second = x_THA.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THA.dtype)


# torch.compile would compile this again for every packing of documents.
@uncompiled
def attend(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Return the attention output [T, H, A]: causal, inside each document, at most `window` keys a query."""
    if documents.cu_seqlens is not None:
        return _attend_any_lengths(q_THA, k_TGA, v_TGA, documents.cu_seqlens, documents.max_length, window)
    if documents.order_T is not None and documents.inverse_T is not None:
        q_THA, k_TGA, v_TGA = (
            permute_rows(x, documents.order_T, documents.inverse_T) for x in (q_THA, k_TGA, v_TGA)
        )
    outputs, start = [], 0
    for length, n_documents in documents.groups:
        stop = start + length * n_documents
        q, k, v = (
            x[start:stop].view(n_documents, length, x.size(1), x.size(2)).transpose(1, 2)
            for x in (q_THA, k_TGA, v_TGA)
        )
        out = _attend_equal_lengths(q, k, v, window)
        outputs.append(out.transpose(1, 2).reshape(stop - start, q_THA.size(1), q_THA.size(2)))
        start = stop
    out_THA = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if documents.order_T is not None and documents.inverse_T is not None:
        out_THA = permute_rows(out_THA, documents.inverse_T, documents.order_T)
    return out_THA


def _attend_any_lengths(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, cu_seqlens: Tensor, max_length: int, window: int | None
) -> Tensor:
    # Imported here because it imports torch.compile's tracer, which takes a second that CPUs can save.
    from torch.nn.attention.varlen import varlen_attn

    out_THA = varlen_attn(
        q_THA,
        k_TGA,
        v_TGA,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        # How many keys before and after the query's own; -1: all.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THA.size(1) != k_TGA.size(1),
    )
    assert isinstance(out_THA, Tensor)
    return out_THA


def _attend_equal_lengths(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attend within documents of one length: q [n, H, length, A], k and v [n, G, length, A]."""
    is_grouped = q.size(1) != k.size(1)
    if window is None or q.size(2) <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    return _attend_windowed(q, k, v, window, is_grouped)


def _attend_windowed(q: Tensor, k: Tensor, v: Tensor, window: int, is_grouped: bool) -> Tensor:
    """Attend in chunks of `window` queries, each to its own chunk and the one before.

    The mask is [W, 2W] whatever the length; a mask of the whole document would be length squared.
    """
    n, _, length, d_head = q.shape
    n_chunks = -(-length // window)
    pad = n_chunks * window - length  # padded keys come after every real query, so causality hides them
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    first = F.scaled_dot_product_attention(
        q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True, enable_gqa=is_grouped
    )

    def chunks(x: Tensor, start: int, stop: int) -> Tensor:
        part = x[:, :, start * window : stop * window]
        heads = part.size(1)
        part = part.reshape(n, heads, stop - start, window, d_head).transpose(1, 2)
        return part.reshape(n * (stop - start), heads, window, d_head)

    k_pair = torch.cat([chunks(k, 0, n_chunks - 1), chunks(k, 1, n_chunks)], dim=2)
    v_pair = torch.cat([chunks(v, 0, n_chunks - 1), chunks(v, 1, n_chunks)], dim=2)
    query = torch.arange(window, device=q.device)[:, None] + window
    key = torch.arange(2 * window, device=q.device)[None, :]
    mask = (key <= query) & (key > query - window)
    rest = F.scaled_dot_product_attention(
        chunks(q, 1, n_chunks), k_pair, v_pair, attn_mask=mask, enable_gqa=is_grouped
    )
    rest = rest.view(n, n_chunks - 1, q.size(1), window, d_head).transpose(1, 2)
    rest = rest.reshape(n, q.size(1), (n_chunks - 1) * window, d_head)
    return torch.cat([first, rest], dim=2)[:, :, :length]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), no biases. A tensor-parallel rank holds whole heads."""

    def __init__(self, cfg: ModelConfig, tp: TensorParallel, recompute: Recompute) -> None:
        super().__init__()
        self.d_head, self.window = cfg.d_head, cfg.sliding_window
        self.tp, self.recomputes = tp, recompute == "selective"
        query_width, key_width = (n * cfg.d_head // tp.size for n in (cfg.n_heads, cfg.n_kv_heads))
        self.q = nn.Linear(cfg.d_model, query_width, bias=False)
        self.k = nn.Linear(cfg.d_model, key_width, bias=False)
        self.v = nn.Linear(cfg.d_model, key_width, bias=False)
        self.o = nn.Linear(query_width, cfg.d_model, bias=False)
        self.q_norm = self.k_norm = None
        if cfg.qk_norm:
            self.q_norm = Norm(cfg.d_head, cfg.norm_eps, tp, is_partial=True)
            self.k_norm = Norm(cfg.d_head, cfg.norm_eps, tp, is_partial=True)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        """Return [T, D] of x_TD; under sequence parallelism both hold this rank's tokens only."""
        return self.tp.leave(
            recompute_if(self.recomputes, self._partial, self.tp.enter(x_TD), rope, documents)
        )

    def _partial(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        out_THA = attend(*self.project(x_TD, rope), documents, self.window)
        out_TD: Tensor = self.o(out_THA.flatten(1))
        return out_TD

    def project(self, x_TD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, H, A], keys and values [T, G, A], rotated to their positions."""
        q_THA = self.q(x_TD).view(x_TD.size(0), -1, self.d_head)
        k_TGA = self.k(x_TD).view(x_TD.size(0), -1, self.d_head)
        v_TGA = self.v(x_TD).view(x_TD.size(0), -1, self.d_head)
        if self.q_norm is not None and self.k_norm is not None:
            q_THA, k_TGA = self.q_norm(q_THA), self.k_norm(k_TGA)
        return apply_rope(q_THA, *rope), apply_rope(k_TGA, *rope), v_TGA
