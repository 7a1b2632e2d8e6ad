"""The slow twin: the whole model and its loss written out token by token, so that a reader can check it.

It takes the parameters of a Decoder by name and computes in their dtype (fp64 in the tests) with ordinary
autograd. It shares no arithmetic with the fast path: no permutation, no dispatch, no grouped product, no
fused attention.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState

Params = dict[str, Tensor]


@dataclass
class ReferenceOutput:
    """hidden [B, S, D]; the other fields list sums over counted tokens, one for each expert layer."""

    hidden: Tensor
    balance_sums: list[Tensor]
    z_sums: list[Tensor]
    counts: list[list[int]]
    n_dropped: list[int]


def reference_forward(
    params: Params, cfg: ModelConfig, tokens: Tensor, doc_ids: Tensor, is_counted: Tensor, state: RouterState
) -> ReferenceOutput:
    """Compute what Decoder.forward computes. tokens, doc_ids and is_counted are [B, S]."""
    out = ReferenceOutput(torch.empty(0), [], [], [], [])
    x = params["embed.weight"][tokens]
    for layer in range(cfg.n_layers):
        name = f"blocks.{layer}."
        h = rms_norm(x, params[name + "attn_norm.weight"], cfg.norm_eps)
        x = x + attention(params, name + "attn.", cfg, h, doc_ids)
        h = rms_norm(x, params[name + "ffn_norm.weight"], cfg.norm_eps)
        if layer < cfg.n_dense_layers:
            x = x + swiglu(h, *(params[f"{name}ffn.{part}.weight"] for part in ("gate", "up", "down")))
        else:
            x = x + expert_layer(
                params, name + "moe.", cfg, h, is_counted, state, layer - cfg.n_dense_layers, out
            )
    out.hidden = rms_norm(x, params["norm.weight"], cfg.norm_eps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., D] and multiply it by weight [D] (Zhang and Sennrich 2019, equation 4)."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Apply gate [F, D], up [F, D] and down [D, F] to x [..., D]."""
    pre = x @ gate.T
    return (pre * torch.sigmoid(pre) * (x @ up.T)) @ down.T


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one head vector [A] to its position (Su et al. 2021, equation 15), pairs (i, i + A/2)."""
    half = x.numel() // 2
    rotated = [torch.empty(0)] * x.numel()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.numel())
        rotated[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        rotated[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(rotated)


def attention(params: Params, name: str, cfg: ModelConfig, h: Tensor, doc_ids: Tensor) -> Tensor:
    """Return the attention layer's output for h [B, S, D], without the residual; doc_ids [B, S]."""
    n_seqs, seq_len, _ = h.shape

    def heads(which: str) -> Tensor:
        projected: Tensor = (h @ params[f"{name}{which}.weight"].T).unflatten(-1, (-1, cfg.d_head))
        if which == "v":
            return projected
        if cfg.qk_norm:
            projected = rms_norm(projected, params[f"{name}{which}_norm.weight"], cfg.norm_eps)
        rows = [
            rotate(projected[b, s, i], s, cfg.rope_theta)
            for b in range(n_seqs)
            for s in range(seq_len)
            for i in range(projected.size(2))
        ]
        return torch.stack(rows).view_as(projected)

    q, k, v = heads("q"), heads("k"), heads("v")
    out = []
    for b in range(n_seqs):
        for s in range(seq_len):
            window = seq_len if cfg.sliding_window is None else cfg.sliding_window
            visible = [t for t in range(max(0, s - window + 1), s + 1) if doc_ids[b, t] == doc_ids[b, s]]
            for i in range(cfg.n_heads):
                group = i // (cfg.n_heads // cfg.n_kv_heads)
                scores = torch.stack([q[b, s, i] @ k[b, t, group] for t in visible]) / math.sqrt(cfg.d_head)
                probs = scores.exp() / scores.exp().sum()
                out.append(sum(prob * v[b, t, group] for prob, t in zip(probs, visible, strict=True)))
    return torch.stack(out).view(n_seqs, seq_len, -1) @ params[name + "o.weight"].T


def choose(scores: list[float], cfg: ModelConfig) -> list[int]:
    """Return the chosen expert ids of one token, best first; ties go to the lower id."""
    size = cfg.n_experts // cfg.router.n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(cfg.router.n_groups)]
    groups.sort(key=lambda ids: -sum(sorted((scores[e] for e in ids), reverse=True)[:2]))
    open_ids = [e for ids in groups[: cfg.router.top_groups] for e in ids]
    return sorted(open_ids, key=lambda e: (-scores[e], e))[: cfg.top_k]


def expert_layer(
    params: Params,
    name: str,
    cfg: ModelConfig,
    h: Tensor,
    is_counted: Tensor,
    state: RouterState,
    moe_idx: int,
    out: ReferenceOutput,
) -> Tensor:
    """Route and compute one expert layer for h [B, S, D]; append its statistics to out."""
    n_seqs, seq_len, _ = h.shape
    logits = h @ params[name + "router.weight"].T
    if cfg.router.score == "softmax":
        scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
    else:
        scores = 1 / (1 + torch.exp(-logits))
    probs = scores / scores.sum(-1, keepdim=True)
    balance, z, counts, n_dropped = h.new_zeros(()), h.new_zeros(()), [0] * cfg.n_experts, 0
    mixed = []
    for b in range(n_seqs):
        chosen = [
            choose((scores[b, s].detach() + state.bias_ME[moe_idx]).tolist(), cfg) for s in range(seq_len)
        ]
        kept = kept_rows(chosen, scores[b], is_counted[b], cfg)
        load = [0] * cfg.n_experts
        for s in range(seq_len):
            weights = torch.stack([scores[b, s, e] for e in chosen[s]])
            if cfg.router.normalize:
                weights = weights / weights.sum()
            y = torch.zeros_like(h[b, s])
            for weight, e in zip(weights, chosen[s], strict=True):
                if (s, e) in kept:
                    gate, up = params[f"{name}experts.gate_up"][e].T.chunk(2)
                    expert = swiglu(h[b, s], gate, up, params[f"{name}experts.down"][e])
                    y = y + cfg.router.scale * weight * expert
                elif is_counted[b, s]:
                    n_dropped += 1
                if is_counted[b, s]:
                    load[e] += 1
            mixed.append(y)
        load_frac = [n / max(1, sum(load)) for n in load]
        if cfg.balance.scope == "batch":
            load_frac = state.load_frac_ME[moe_idx].tolist()
        for s in range(seq_len):
            if not is_counted[b, s]:
                continue
            z = z + torch.log(logits[b, s].exp().sum()) ** 2
            for e in range(cfg.n_experts):
                balance = balance + cfg.n_experts * load_frac[e] * probs[b, s, e]
        counts = [c + n for c, n in zip(counts, load, strict=True)]
    out.balance_sums.append(balance)
    out.z_sums.append(z)
    out.counts.append(counts)
    out.n_dropped.append(n_dropped)
    y = torch.stack(mixed).view_as(h)
    if cfg.n_shared_experts:
        y = y + swiglu(h, *(params[f"{name}shared.{part}.weight"] for part in ("gate", "up", "down")))
    return y


def kept_rows(
    chosen: list[list[int]], scores: Tensor, is_counted: Tensor, cfg: ModelConfig
) -> set[tuple[int, int]]:
    """Return the (position, expert) rows of one sequence that fit the capacity.

    Rows of counted tokens come first, heavier before lighter ones, then the other rows. Ties go to the
    earlier position. scores [S, E], is_counted [S].
    """
    rows = [(s, e) for s, ids in enumerate(chosen) for e in ids]
    if cfg.router.capacity_factor is None:
        return set(rows)
    capacity = math.ceil(cfg.router.capacity_factor * len(rows) / cfg.n_experts)
    kept: set[tuple[int, int]] = set()
    for expert in range(cfg.n_experts):
        mine = sorted(
            (r for r in rows if r[1] == expert),
            key=lambda r: (-float(scores[r].detach()) if is_counted[r[0]] else 1.0, r[0]),
        )
        kept.update(mine[:capacity])
    return kept
