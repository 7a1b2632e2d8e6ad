"""The router's choice of experts and weights, and the effects of ties, groups, bias and capacity."""

import math

import pytest
import torch

from tests.models import tiny_config
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.router import Router, Routing, best_of_each, choose_experts, within_capacity


def build_router(cfg: ModelConfig) -> Router:
    router = Router(cfg, Unsplit())
    torch.nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    return router


def route(cfg: ModelConfig, x: torch.Tensor, bias: torch.Tensor | None = None) -> Routing:
    state = RouterState.initial(cfg)
    bias = state.bias_ME[0] if bias is None else bias
    counted = torch.ones(x.size(0), dtype=torch.bool)
    return build_router(cfg)(x, bias, state.load_frac_ME[0], counted)[0]


def tokens(cfg: ModelConfig, n_seqs: int = 4) -> torch.Tensor:
    return torch.randn(n_seqs * cfg.seq_len, cfg.d_model, generator=torch.Generator().manual_seed(1))


def test_experts_are_distinct_and_weights_sum_to_the_scale() -> None:
    cfg = tiny_config(top_k=3, router={"scale": 2.5})
    routing = route(cfg, tokens(cfg))
    assert all(len(set(row)) == 3 for row in routing.expert_ids_TK.tolist())
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.full((4 * cfg.seq_len,), 2.5))


def test_unnormalised_weights_are_the_probabilities_of_the_chosen() -> None:
    cfg = tiny_config(router={"normalize": False})
    x = tokens(cfg)
    routing = route(cfg, x)
    probs = (x @ build_router(cfg).weight.T).softmax(-1)
    torch.testing.assert_close(routing.weights_TK, probs.gather(-1, routing.expert_ids_TK))
    assert (routing.weights_TK.sum(-1) < 1).all()


def test_ties_go_to_the_lower_id() -> None:
    scores = torch.tensor([[0.5, 0.7, 0.7, 0.5, 0.7, 0.1]])
    assert choose_experts(scores, 4, n_groups=1, top_groups=1).tolist() == [[1, 2, 4, 0]]


def test_the_best_of_each_row_are_those_of_a_stable_sort() -> None:
    """Without ties, with ties among the best or with the first one left out, and with special values."""
    torch.manual_seed(0)
    few_values = torch.randint(3, (300, 12)).float()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 0.5])[torch.randint(6, (200, 12))]
    for scores in (torch.rand(300, 12), few_values, special, torch.ones(4, 12), torch.ones(0, 12)):
        want = scores.sort(dim=-1, descending=True, stable=True).indices
        for dtype in (torch.float32, torch.float64):
            for n in (1, 2, 5, 11, 12):
                assert torch.equal(best_of_each(scores.to(dtype), n), want[:, :n])
    torch.library.opcheck(best_of_each, (few_values, 2))


def test_groups_limit_the_choice_by_their_two_best() -> None:
    # Group 1 holds the single best expert; group 0 the best pair.
    scores = torch.tensor([[0.6, 0.6, 0.0, 0.9, 0.1, 0.0]])
    assert choose_experts(scores, 3, n_groups=2, top_groups=1).tolist() == [[0, 1, 2]]
    assert choose_experts(scores, 3, n_groups=2, top_groups=2).tolist() == [[3, 0, 1]]


def test_groups_of_one_expert_compete_as_experts() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.5]])
    assert choose_experts(scores, 2, n_groups=4, top_groups=2).tolist() == [[1, 3]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_entropy_is_of_the_probabilities_of_counted_tokens(score: str) -> None:
    """Sigmoid scores are divided by their sum first; one expert's entropy term is -p log p, in nats."""
    cfg = tiny_config(router={"score": score})
    x, state = tokens(cfg).double(), RouterState.initial(cfg)
    router, counted = build_router(cfg).double(), torch.arange(x.size(0)) % 3 > 0
    _, stats = router(x, state.bias_ME[0], state.load_frac_ME[0], counted)
    logits = (x @ router.weight.T)[counted]
    odds = logits.exp() if score == "softmax" else 1 / (1 + (-logits).exp())
    probs = odds / odds.sum(-1, keepdim=True)
    torch.testing.assert_close(stats.entropy_sum, -(probs * probs.log()).sum(), rtol=1e-12, atol=0)


def test_bias_changes_who_is_chosen_and_never_a_weight() -> None:
    cfg = tiny_config(router={"normalize": False})
    x = tokens(cfg)
    bias = torch.zeros(cfg.n_experts)
    bias[5] = 10.0
    plain, biased = route(cfg, x), route(cfg, x, bias)
    assert (biased.expert_ids_TK == 5).any(-1).all() and not (plain.expert_ids_TK == 5).any(-1).all()
    probs = (x @ build_router(cfg).weight.T).softmax(-1)
    torch.testing.assert_close(biased.weights_TK, probs.gather(-1, biased.expert_ids_TK))


def test_router_computes_in_fp32_under_bf16() -> None:
    cfg = tiny_config()
    router = build_router(cfg).bfloat16()
    x = tokens(cfg).bfloat16()
    state = RouterState.initial(cfg)
    counted = torch.ones(x.size(0), dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        routing, stats = router(x, state.bias_ME[0], state.load_frac_ME[0], counted)
    assert routing.weights_TK.dtype == stats.z_sum.dtype == torch.float32
    logits = x.float() @ router.weight.float().T
    torch.testing.assert_close(stats.z_sum, torch.logsumexp(logits, -1).square().sum())


def test_capacity_keeps_the_heaviest_rows_of_each_sequence() -> None:
    expert_ids = torch.tensor([[0], [0], [0], [1], [0], [1]])  # two sequences of three tokens
    weights = torch.tensor([[0.2], [0.9], [0.5], [0.1], [0.3], [0.1]])
    assert within_capacity(expert_ids, weights, 2, 1, 2).flatten().tolist() == [
        False,
        True,
        False,
        True,
        True,
        False,  # as heavy as the fourth, but later
    ]


def test_padding_never_displaces_a_counted_token() -> None:
    cfg = tiny_config(router={"capacity_factor": 0.75})
    x = tokens(cfg, n_seqs=1)
    state, counted = RouterState.initial(cfg), torch.arange(cfg.seq_len) < 4
    kept = []
    for padding in (0.0, 50.0):
        x[4:] = padding * x[:1]  # prefers the first token's experts, weakly or strongly
        routing, _ = build_router(cfg)(x, state.bias_ME[0], state.load_frac_ME[0], counted)
        assert routing.is_kept_TK is not None
        kept.append(routing.is_kept_TK[:4])
    assert torch.equal(*kept)


def test_capacity_of_a_sequence_does_not_depend_on_its_neighbours() -> None:
    cfg = tiny_config(router={"capacity_factor": 0.75})
    x = tokens(cfg, n_seqs=4)
    together = route(cfg, x).is_kept_TK
    assert together is not None and not together.all()
    alone = [route(cfg, part).is_kept_TK for part in x.split(cfg.seq_len)]
    assert torch.equal(together, torch.cat([kept for kept in alone if kept is not None]))
