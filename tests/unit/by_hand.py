"""The loss of one document, and the experts of its tokens, written out."""

import torch

from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.moe.reference import ReferenceOutput, attention, choose, expert_layer, rms_norm, swiglu


@torch.no_grad()
def nll_by_hand(decoder: Decoder, state: RouterState, ids: list[int], bos_id: int) -> float:
    """Score one document window by window, one sequence at a time, with a plain log-softmax."""
    stream, total, seq_len = [bos_id, *ids], 0.0, decoder.cfg.seq_len
    for first in range(0, len(ids), seq_len):
        end = min(first + seq_len, len(ids))
        begin = max(0, end - seq_len)
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
        tokens[0, : end - begin] = torch.tensor(stream[begin:end])
        is_counted = torch.arange(seq_len)[None] < end - begin
        hidden, _ = decoder(tokens, torch.zeros_like(tokens), is_counted, state)
        logprobs = decoder.logits(hidden)[0].double().log_softmax(-1)
        total -= sum(float(logprobs[i - begin, stream[i + 1]]) for i in range(first, end))
    return total


@torch.no_grad()
def experts_by_hand(
    decoder: Decoder, cfg: ModelConfig, state: RouterState, token_ids: list[int]
) -> list[list[list[tuple[int, float]]]]:
    """Return (expert, weight) of each choice of each token of one sequence, by expert layer, best first."""
    params = dict(decoder.named_parameters())
    x = params["embed.weight"][torch.tensor([token_ids])]
    doc_ids, is_counted = torch.zeros(x.shape[:2]), torch.ones(x.shape[:2], dtype=torch.bool)
    unused = ReferenceOutput(torch.empty(0), [], [], [], [])
    layers: list[list[list[tuple[int, float]]]] = []
    for layer in range(cfg.n_layers):
        name = f"blocks.{layer}."
        h = rms_norm(x, params[name + "attn_norm.weight"], cfg.norm_eps)
        x = x + attention(params, name + "attn.", cfg, h, doc_ids)
        h = rms_norm(x, params[name + "ffn_norm.weight"], cfg.norm_eps)
        if layer < cfg.n_dense_layers:
            x = x + swiglu(h, *(params[f"{name}ffn.{part}.weight"] for part in ("gate", "up", "down")))
            continue
        logits = (h @ params[name + "moe.router.weight"].T)[0]
        scores = logits.softmax(-1) if cfg.router.score == "softmax" else logits.sigmoid()
        rows = []
        for token_scores in scores:
            chosen = choose((token_scores + state.bias_ME[len(layers)]).tolist(), cfg)
            total = sum(float(token_scores[e]) for e in chosen) if cfg.router.normalize else 1.0
            rows.append([(e, cfg.router.scale * float(token_scores[e]) / total) for e in chosen])
        x = x + expert_layer(params, name + "moe.", cfg, h, is_counted, state, len(layers), unused)
        layers.append(rows)
    return layers
