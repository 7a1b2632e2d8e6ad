"""The router: which experts a token goes to, with which weights, and statistics for balancing.

Shapes
  B sequences   T tokens   D d_model   E n_experts   K top_k   Q n_groups

Logits and scores are fp32 or wider, and experts are chosen by them. bf16 has 8 significant bits, so experts
within 0.4% of each other would tie, and the winner would depend on the tiling of a matrix product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterStats, balance_sum, counts_per_sequence, load_fractions, z_sum
from turnout.moe.parallel.tensor_parallel import TensorParallel
from turnout.moe.recompute import RoutingMemo
from turnout.moe.torch_compile import define_operator, uncompiled


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    expert_ids_TK  [T, K] int64, distinct per token, best first
    weights_TK     [T, K] fp32 or wider
    is_kept_TK     [T, K] bool, False where the capacity factor drops the row; None: dropless
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    is_kept_TK: Tensor | None


class Router(nn.Module):
    def __init__(self, cfg: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.cfg, self.tp = cfg, tp
        self.weight = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model))

    def forward(
        self,
        x: Tensor,
        bias_E: Tensor,
        load_frac_E: Tensor,
        is_counted_T: Tensor,
        memo: RoutingMemo | None = None,
    ) -> tuple[Routing, RouterStats]:
        """Route every token; only tokens of is_counted_T [T] bool enter the statistics.

        x: this rank's tokens [T / tp.size, D]. Routing and statistics are of all T, the same on each
        tensor-parallel rank. bias_E [E], load_frac_E [E]: this layer's rows of RouterState. T is a multiple
        of seq_len. If the memo holds a choice, that choice is used.
        """
        memo = memo or RoutingMemo()
        router, n_seqs = self.cfg.router, is_counted_T.numel() // self.cfg.seq_len
        logits_TE, scores_TE = self._score(x)
        expert_ids_TK, is_kept_TK = self._choose(scores_TE.detach(), bias_E, is_counted_T, memo)
        weights_TK = self._weigh(scores_TE, expert_ids_TK)
        # Sigmoid scores do not sum to 1 over experts, but balancing is defined on probabilities
        # (DeepSeek-V3, 2412.19437, equation 19).
        probs_TE = scores_TE if router.score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
        counts_BE = counts_per_sequence(expert_ids_TK, is_counted_T, n_seqs, self.cfg.n_experts)
        load_frac_TE = load_frac_E.expand_as(probs_TE)
        if self.cfg.balance.scope == "sequence":
            load_frac_BE = load_fractions(counts_BE).to(probs_TE.dtype)
            load_frac_TE = load_frac_BE.repeat_interleave(self.cfg.seq_len, dim=0)
        n_dropped = torch.zeros((), dtype=torch.int64, device=x.device)
        if is_kept_TK is not None:
            n_dropped = (~is_kept_TK & is_counted_T.unsqueeze(1)).sum()
        stats = RouterStats(
            balance_sum=balance_sum(probs_TE, load_frac_TE, is_counted_T),
            z_sum=z_sum(logits_TE, is_counted_T),
            counts_E=counts_BE.sum(0),
            entropy_sum=(torch.special.entr(probs_TE.detach()).sum(-1) * is_counted_T).sum(),
            n_dropped=n_dropped,
            n_extra_chunks=torch.zeros_like(n_dropped),  # set by the layer
        )
        return Routing(expert_ids_TK, weights_TK, is_kept_TK), stats

    def route(self, x_TD: Tensor, bias_E: Tensor) -> Routing:
        """Route any number of tokens for inference: dropless and without statistics."""
        _, scores_TE = self._score(x_TD)
        expert_ids_TK = self._best(scores_TE, bias_E)
        return Routing(expert_ids_TK, self._weigh(scores_TE, expert_ids_TK), None)

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and scores [T, E] of the tokens of all tensor-parallel ranks."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.tp.shared(self.weight.to(wide)))
        logits_TE = self.tp.gather_rows(logits)
        is_softmax = self.cfg.router.score == "softmax"
        return logits_TE, logits_TE.softmax(-1) if is_softmax else logits_TE.sigmoid()

    def _weigh(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        weights_TK = scores_TE.gather(-1, expert_ids_TK)
        if self.cfg.router.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK * self.cfg.router.scale

    def _best(self, scores_TE: Tensor, bias_E: Tensor) -> Tensor:
        router = self.cfg.router
        return choose_experts(
            scores_TE + bias_E, self.cfg.top_k, n_groups=router.n_groups, top_groups=router.top_groups
        )

    # Hidden from torch.compile, so that a recomputation is the same graph and saves the same tensors.
    @uncompiled
    def _choose(
        self, scores_TE: Tensor, bias_E: Tensor, is_counted_T: Tensor, memo: RoutingMemo
    ) -> tuple[Tensor, Tensor | None]:
        """Return each token's experts [T, K] and which rows they keep; from the memo if it has them."""
        if memo.expert_ids_TK is None:
            memo.expert_ids_TK = self._best(scores_TE, bias_E)
            memo.scores_TK = scores_TE.gather(-1, memo.expert_ids_TK)
            memo.is_kept_TK = self._within_capacity(memo.expert_ids_TK, memo.scores_TK, is_counted_T)
        else:
            memo.check_scores(scores_TE.gather(-1, memo.expert_ids_TK))
        return memo.expert_ids_TK, memo.is_kept_TK

    def _within_capacity(
        self, expert_ids_TK: Tensor, weights_TK: Tensor, is_counted_T: Tensor
    ) -> Tensor | None:
        if self.cfg.router.capacity_factor is None:
            return None
        n_seqs = is_counted_T.numel() // self.cfg.seq_len
        # Weights are at least 0, so padding and masked tokens come after every counted token.
        weights_TK = weights_TK.masked_fill(~is_counted_T.unsqueeze(1), -1.0)
        rows_per_seq = self.cfg.seq_len * self.cfg.top_k
        capacity = math.ceil(self.cfg.router.capacity_factor * rows_per_seq / self.cfg.n_experts)
        return within_capacity(expert_ids_TK, weights_TK, n_seqs, capacity, self.cfg.n_experts)


def choose_experts(scores_TE: Tensor, top_k: int, *, n_groups: int, top_groups: int) -> Tensor:
    """Return the ids of the top_k best experts of each token, [T, K], best first; ties go to the lower id.

    With n_groups > 1 only experts of the top_groups best groups compete. A group's score is the sum of its
    two best experts (DeepSeek-V3, 2412.19437, section 2.1.2).
    """
    if top_groups < n_groups:
        grouped_TQE = scores_TE.unflatten(-1, (n_groups, -1))
        n_best = min(2, grouped_TQE.size(-1))
        group_scores_TQ = grouped_TQE.topk(n_best, dim=-1).values.sum(-1)
        group_ids = best_of_each(group_scores_TQ, top_groups)
        is_open_TQ = torch.zeros_like(group_scores_TQ, dtype=torch.bool).scatter_(1, group_ids, True)
        scores_TE = grouped_TQE.masked_fill(~is_open_TQ.unsqueeze(-1), -math.inf).flatten(1)
    return best_of_each(scores_TE, top_k)


def _best_of_each(scores: Tensor, n: int) -> Tensor:
    """Return the indices [T, n] of the n best of scores [T, experts or groups], best first.

    Ties go to the lower index.
    """
    # A stable sort keeps equal scores in the order of their indices; topk promises no order among ties.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :n].contiguous()


def _best_of_each_on_cpu(scores: Tensor, n: int) -> Tensor:
    """Sort only the rows with ties: a sort is up to 14 times slower than topk (LOG.md)."""
    values, indices = scores.topk(min(n + 1, scores.size(1)), dim=-1)  # one more: the last may tie with it
    best = indices[:, :n].contiguous()
    is_clear = (values[:, :-1] > values[:, 1:]).all(dim=-1)
    unclear = (~is_clear).nonzero().squeeze(1)
    if unclear.numel():
        best[unclear] = scores[unclear].sort(dim=-1, descending=True, stable=True).indices[:, :n]
    return best


def _fake_best_of_each(scores: Tensor, n: int) -> Tensor:
    return scores.new_empty(scores.size(0), n, dtype=torch.int64)


# An operator, so that tracing tensors does not ask which rows have ties.
best_of_each: Callable[[Tensor, int], Tensor] = define_operator(
    "best_of_each", _best_of_each, _fake_best_of_each, on_cpu=_best_of_each_on_cpu
)


def within_capacity(
    expert_ids_TK: Tensor, weights_TK: Tensor, n_seqs: int, capacity: int, n_experts: int
) -> Tensor:
    """Return which rows experts keep, [T, K] bool: each expert at most `capacity` rows of each sequence.

    The rows of lowest weight are dropped first; among equal weights, those of later tokens. The limit is per
    sequence, not per micro-batch, so it does not matter how sequences are spread over ranks.
    """
    n_rows = expert_ids_TK.numel()
    by_weight_N = weights_TK.flatten().sort(descending=True, stable=True).indices
    seq_of_row_N = torch.arange(n_rows, device=expert_ids_TK.device) // (n_rows // n_seqs)
    bucket_N = seq_of_row_N * n_experts + expert_ids_TK.flatten()
    order_N = by_weight_N[bucket_N[by_weight_N].sort(stable=True).indices]  # by bucket, heaviest first
    sorted_bucket_N = bucket_N[order_N]
    first_in_bucket_N = torch.searchsorted(sorted_bucket_N, sorted_bucket_N)
    position_N = torch.arange(n_rows, device=order_N.device) - first_in_bucket_N
    is_kept_N = torch.empty(n_rows, dtype=torch.bool, device=order_N.device)
    is_kept_N[order_N] = position_N < capacity
    return is_kept_N.view_as(expert_ids_TK)
