"""Load balancing: the balancing loss, the z-loss and the bias that balances without a loss.

Shapes
  B sequences   S seq_len   T tokens = B*S   E n_experts   K top_k   M expert layers of the model

Every term is a sum over counted tokens; training/step.py divides once by the token count of the global batch.
With f_e the fraction of routed rows that went to expert e and p_te the router probability, the sum is
    n_experts * sum_t sum_e f_e p_te.
Divided by the tokens, it is n_experts * sum_e f_e P_e (Switch Transformer, Fedus et al. 2021, section 2.2):
1.0 if routing is uniform, n_experts / top_k if it has collapsed, for every top_k. f carries no gradient.
  scope sequence: f is of the token's own sequence, however sequences are spread over ranks.
  scope batch:    f is of the previous optimizer step's global batch, a constant on every rank.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from turnout.moe.config import BalanceConfig, ModelConfig


@dataclass(frozen=True)
class RouterState:
    """What the routers remember between optimizer steps; the same on every rank.

    bias_ME       [M, E] fp32, added to the scores when experts are chosen, never to their weights
    load_frac_ME  [M, E] fp32, fraction of routed rows in the previous step's global batch; uniform at first
    """

    bias_ME: Tensor
    load_frac_ME: Tensor

    @classmethod
    def initial(cls, cfg: ModelConfig, device: torch.device | str = "cpu") -> Self:
        shape = (cfg.n_moe_layers, cfg.n_experts)
        return cls(torch.zeros(shape, device=device), torch.full(shape, 1 / cfg.n_experts, device=device))

    def after_step(self, counts_ME: Tensor, cfg: BalanceConfig) -> Self:
        """Return the state after an optimizer step whose global batch sent counts_ME [M, E] rows."""
        bias_ME = self.bias_ME
        if cfg.bias_rate:
            bias_ME = update_bias(bias_ME, counts_ME, cfg.bias_rate)
        return type(self)(bias_ME, load_fractions(counts_ME).float())


@dataclass(frozen=True)
class RouterStats:
    """Statistics of one expert layer in one micro-batch, or (stacked, [M, ...]) of all layers.

    Masked tokens never count.

    balance_sum  [] with gradient, see the module docstring
    z_sum        [] with gradient, sum over tokens of logsumexp(logits)^2
    counts_E     [E] int64, rows that chose each expert, before any capacity limit
    entropy_sum  [] nats, sum over tokens of the entropy of the router probabilities
    n_dropped    [] int64, rows cut by the capacity factor
    n_extra_chunks  [] int64, chunks that are sent only because a rank would have had too many rows at once
    """

    balance_sum: Tensor
    z_sum: Tensor
    counts_E: Tensor
    entropy_sum: Tensor
    n_dropped: Tensor
    n_extra_chunks: Tensor

    @classmethod
    def stack(cls, layers: list[Self]) -> Self:
        return cls(*(torch.stack([getattr(layer, f.name) for layer in layers]) for f in fields(cls)))


def load_fractions(counts: Tensor) -> Tensor:
    """Return counts [..., E] as fractions that sum to 1 over experts, in fp64; all 0 if all counts are."""
    total = counts.sum(-1, keepdim=True)
    return counts.double() / total.clamp(min=1)


def balance_sum(probs_TE: Tensor, load_frac_TE: Tensor, is_counted_T: Tensor) -> Tensor:
    """Return n_experts * sum over counted t, e of load_frac_te * probs_te."""
    per_token_T = (probs_TE * load_frac_TE.detach().to(probs_TE.dtype)).sum(-1)
    return probs_TE.size(1) * (per_token_T * is_counted_T).sum()


def z_sum(logits_TE: Tensor, is_counted_T: Tensor) -> Tensor:
    """Return the sum over counted tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, equation 5)."""
    return (torch.logsumexp(logits_TE, dim=-1).square() * is_counted_T).sum()


def counts_per_sequence(expert_ids_TK: Tensor, is_counted_T: Tensor, n_seqs: int, n_experts: int) -> Tensor:
    """Return how many rows of counted tokens each sequence sends to each expert, [B, E] int64."""
    weights = is_counted_T.long().repeat_interleave(expert_ids_TK.size(1)).view(n_seqs, -1)
    counts_BE = torch.zeros(n_seqs, n_experts, dtype=torch.int64, device=expert_ids_TK.device)
    return counts_BE.scatter_add_(1, expert_ids_TK.reshape(n_seqs, -1), weights)


def update_bias(bias_ME: Tensor, counts_ME: Tensor, rate: float) -> Tensor:
    """Raise the bias of under-loaded experts and lower that of over-loaded ones by `rate`.

    Auxiliary-loss-free balancing, Wang et al. 2024 (2408.15664), algorithm 1: b_i += u * sign(mean load -
    load_i). counts_ME are of the global batch, so the result is the same on every rank.
    """
    # n_experts * count against the total: exact integers, so that no rounding turns a tie into a sign.
    shortage_ME = counts_ME.sum(-1, keepdim=True) - counts_ME * counts_ME.size(-1)
    return bias_ME + rate * shortage_ME.sign().to(bias_ME.dtype)
