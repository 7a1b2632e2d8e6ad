"""What `--dry-run` counts, against the built models and the published totals."""

import pytest

from launch.plan import count_built_params, plan_lines, rank_params, state_bytes
from launch.settings import load_config
from moe.counts import n_active_params, n_params
from tests.runs import run_config
from training.parallel import Layout

# (recipe, published total, published active), in billions, with as many digits as their papers give.
PUBLISHED = [
    ("olmoe-1b-7b", "6.9", "1.3"),
    ("mixtral-8x7b", "46.7", "12.9"),
    ("qwen3-30b-a3b", "30.5", "3.3"),
]


@pytest.mark.parametrize(("recipe", "total", "active"), PUBLISHED)
def test_published_shapes_have_their_published_size(recipe: str, total: str, active: str) -> None:
    model = load_config(recipe).model
    assert count_built_params(model) == n_params(model)
    assert f"{n_params(model) / 1e9:.1f}" == total
    # Qwen3 truncates 3.35.
    assert n_active_params(model) / 1e9 == pytest.approx(float(active), abs=0.055)


@pytest.mark.parametrize(
    ("recipe", "exact"), [("mixtral-8x7b", 46_702_792_704), ("qwen3-30b-a3b", 30_532_122_624)]
)
def test_exact_totals_of_the_released_checkpoints(recipe: str, exact: int) -> None:
    assert n_params(load_config(recipe).model) == exact


def test_small_has_about_a_hundred_million_parameters() -> None:
    assert n_params(load_config("small").model) == pytest.approx(100e6, rel=0.1)


def test_state_bytes_follow_precision_and_zero_stage() -> None:
    cfg = run_config(train={"precision": "fp32"})
    n = n_params(cfg.model)
    assert n % 2 == 0
    one = state_bytes(cfg, Layout(1))
    assert (one.weights, one.gradients, one.optimizer) == (4 * n, 4 * n, 12 * n)
    assert state_bytes(cfg, Layout(2)).optimizer == 6 * n
    half = state_bytes(run_config(train={"precision": "bf16"}), Layout(2))
    assert (half.weights, half.gradients) == (2 * n, 6 * n)
    split = state_bytes(run_config(train={"precision": "bf16"}, parallel={"zero_stage": 2}), Layout(2))
    assert (split.gradients, split.total) == (4 * n, 12 * n)


def test_a_rank_holds_its_part_of_matrices_and_experts() -> None:
    cfg = run_config(model={"n_kv_heads": 2})
    model = cfg.model
    in_experts = model.n_layers * model.n_experts * 3 * model.d_model * model.d_expert
    whole = model.n_layers * (2 * model.d_model + model.n_experts * model.d_model) + model.d_model
    split = n_params(model) - in_experts - whole
    assert rank_params(model, Layout(4, tp=2, ep=4)) == (whole + split // 2, in_experts // 4)
    dense, experts = rank_params(model, Layout(4, tp=2, ep=2))
    # Dense state is split over dp=2, the experts' over edp=2, whatever tp is.
    state = state_bytes(cfg, Layout(4, tp=2, ep=2))
    assert state.optimizer == 12 * (-(-dense // 2) + experts // 2)


def test_plan_states_tokens_per_step_in_its_factors() -> None:
    rows = dict(plan_lines(run_config(), Layout(2)))
    assert rows["tokens per step"] == "96 = 2 data-parallel ranks x 2 micro-batches x 2 sequences x 12 tokens"
    assert rows["tokens in all"] == "1,920"
