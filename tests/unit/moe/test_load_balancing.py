"""The balancing loss in closed form and by finite differences, and the direction of the bias."""

import math

import pytest
import torch

from tests.models import tiny_config
from turnout.moe.config import BalanceConfig
from turnout.moe.load_balancing import RouterState, balance_sum, load_fractions, update_bias, z_sum
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.router import Router

E = 6


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_uniform_routing_gives_one_and_collapse_gives_experts_over_k(top_k: int) -> None:
    counted = torch.ones(10, dtype=torch.bool)
    uniform = torch.full((10, E), 1 / E, dtype=torch.float64)
    assert balance_sum(uniform, uniform, counted) / 10 == pytest.approx(1.0)
    collapsed = torch.zeros(10, E, dtype=torch.float64)
    collapsed[:, :top_k] = 1 / top_k
    assert balance_sum(collapsed, collapsed, counted) / 10 == pytest.approx(E / top_k)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_is_that_of_finite_differences_with_f_held(scope: str, score: str) -> None:
    cfg = tiny_config(router={"score": score}, balance={"scope": scope})
    router = Router(cfg, Unsplit()).double()
    torch.nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2 * cfg.seq_len, cfg.d_model, generator=torch.Generator().manual_seed(1)).double()
    state = RouterState.initial(cfg)
    load = torch.softmax(torch.arange(E) / 2.0, 0)
    counted = torch.rand(x.size(0), generator=torch.Generator().manual_seed(2)) > 0.3

    def loss() -> torch.Tensor:
        return router(x, state.bias_ME[0], load, counted)[1].balance_sum

    loss().backward()
    assert router.weight.grad is not None and router.weight.grad.any()
    flat = router.weight.data.view(-1)
    for i in (0, 17, flat.numel() - 1):
        # Steps too small to change a choice, so f, which is piecewise constant, does not move.
        flat[i] += 1e-6
        up = loss().item()
        flat[i] -= 2e-6
        down = loss().item()
        flat[i] += 1e-6
        assert float(router.weight.grad.view(-1)[i]) == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-8)


def test_only_the_probabilities_carry_gradient() -> None:
    probs = torch.full((4, E), 1 / E, requires_grad=True)
    load = torch.full((4, E), 1 / E, requires_grad=True)
    balance_sum(probs, load, torch.ones(4, dtype=torch.bool)).backward()
    assert probs.grad is not None and load.grad is None


def test_sequence_scope_depends_on_each_sequence_alone() -> None:
    cfg = tiny_config()
    router = Router(cfg, Unsplit()).double()
    torch.nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3 * cfg.seq_len, cfg.d_model, generator=torch.Generator().manual_seed(1)).double()
    counted = torch.rand(x.size(0), generator=torch.Generator().manual_seed(2)) > 0.5
    state = RouterState.initial(cfg)

    def sums(rows: slice) -> torch.Tensor:
        return router(x[rows], state.bias_ME[0], state.load_frac_ME[0], counted[rows])[1].balance_sum

    parts = [sums(slice(i * cfg.seq_len, (i + 1) * cfg.seq_len)) for i in range(3)]
    torch.testing.assert_close(sums(slice(None)), torch.stack(parts).sum(), rtol=1e-12, atol=0)


def test_z_sum_is_squared_log_partition_of_counted_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]], requires_grad=True)
    counted = torch.tensor([True, True, False])
    want = math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2
    loss = z_sum(logits, counted)
    assert loss.item() == pytest.approx(want)
    loss.backward()
    assert (logits.grad[:2] > 0).all() and not logits.grad[2].any()  # pushes the log partition towards 0


def test_bias_moves_towards_the_under_loaded_and_counts_ties_as_balanced() -> None:
    bias = torch.zeros(2, 4)
    counts = torch.tensor([[9, 1, 5, 5], [3, 3, 3, 3]])
    moved = update_bias(bias, counts, 0.001)
    torch.testing.assert_close(moved, torch.tensor([[-0.001, 0.001, 0, 0], [0.0, 0, 0, 0]]))


def test_after_a_step_the_state_has_the_new_load_and_the_bias_moves_only_if_asked() -> None:
    cfg = tiny_config()
    state = RouterState.initial(cfg)
    torch.testing.assert_close(state.load_frac_ME.sum(-1), torch.ones(cfg.n_moe_layers))
    counts = torch.arange(cfg.n_moe_layers * E).view(-1, E)
    still = state.after_step(counts, BalanceConfig(bias_rate=0))
    moved = state.after_step(counts, BalanceConfig(bias_rate=0.5))
    assert torch.equal(still.bias_ME, state.bias_ME) and moved.bias_ME.abs().max() == 0.5
    torch.testing.assert_close(moved.load_frac_ME, load_fractions(counts).float())
    assert not load_fractions(torch.zeros(1, E)).any()
