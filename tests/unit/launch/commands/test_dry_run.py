"""What `--dry-run` counts, against the built models and the published totals."""

from pathlib import Path

import pytest

from tests.checkpoints import save_alone
from tests.runs import run_config
from turnout.launch.commands.dry_run import count_built_params, n_checkpoints_kept, plan_lines
from turnout.launch.estimate.memory import state_bytes
from turnout.launch.settings import load_config
from turnout.moe.flops import n_active_params, n_params
from turnout.training.checkpoint.directory import list_checkpoints
from turnout.training.config.checkpoint import CheckpointConfig
from turnout.training.parallel.layout import Layout

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
    # Of each of the two groups of parameters, AdamW's count of steps takes four bytes more.
    assert (one.weights, one.gradients, one.optimizer) == (4 * n, 4 * n, 12 * n + 8)
    assert state_bytes(cfg, Layout(2)).optimizer == 6 * n + 8
    half = state_bytes(run_config(train={"precision": "bf16"}), Layout(2))
    assert (half.weights, half.gradients) == (2 * n, 6 * n)
    split = state_bytes(run_config(train={"precision": "bf16"}, parallel={"zero_stage": 2}), Layout(2))
    assert (split.gradients, split.total) == (2 * n, 10 * n + 8)


def test_a_rank_holds_its_part_of_matrices_and_experts() -> None:
    cfg = run_config(model={"n_kv_heads": 2})
    model = cfg.model
    in_experts = model.n_layers * model.n_experts * 3 * model.d_model * model.d_expert
    whole = model.n_layers * (2 * model.d_model + model.n_experts * model.d_model) + model.d_model
    split = n_params(model) - in_experts - whole
    dense = whole + split // 2
    assert dense % 4 == 0 and in_experts % 8 == 0, "no group is padded"
    assert state_bytes(cfg, Layout(4, tp=2, ep=4)).weights == 4 * (dense + in_experts // 4)
    # Dense state is split over dp=2, the experts' over edp=2, whatever tp is.
    state = state_bytes(cfg, Layout(4, tp=2, ep=2))
    assert state.optimizer == 12 * (dense // 2 + in_experts // 2 // 2) + 3 * 4


def test_plan_states_tokens_per_step_in_its_factors() -> None:
    rows = dict(plan_lines(run_config(), Layout(2)))
    assert rows["tokens per step"] == "96 = 2 data-parallel ranks x 2 micro-batches x 2 sequences x 12 tokens"
    assert rows["tokens in all"] == "1,920"


@pytest.mark.parametrize(
    ("every_steps", "keep_last", "keep_every_steps", "n_kept"),
    [(None, 3, None, 1), (5, 3, None, 3), (3, 2, 6, 4), (7, 1, 14, 2), (10, 1, 10, 2), (6, 9, None, 4)],
)
def test_as_many_checkpoints_stay_as_were_planned(
    every_steps: int | None, keep_last: int, keep_every_steps: int | None, n_kept: int, tmp_path: Path
) -> None:
    kept = CheckpointConfig(
        every_steps=every_steps, keep_last=keep_last, keep_every_steps=keep_every_steps, async_save=False
    )
    cfg = run_config(train={"n_steps": 20}).model_copy(update={"checkpoint": kept})
    steps = [step for step in range(1, 21) if step == 20 or (every_steps and step % every_steps == 0)]
    save_alone(tmp_path, steps, kept=kept)
    assert len(list_checkpoints(tmp_path)) == n_kept
    assert n_checkpoints_kept(cfg) == n_kept


def test_plan_states_what_checkpoints_take() -> None:
    cfg = run_config(
        model={"d_model": 512, "d_expert": 512, "vocab_size": 50000}, checkpoint={"every_steps": 6}
    )
    rows = dict(plan_lines(cfg, Layout(2)))
    one = 12 * n_params(cfg.model) / 2**30
    assert rows["checkpoint"] == (
        f"{one:.3g} GiB every 6 steps, 3 kept at once = {3 * one:.3g} GiB, and room for one more"
    )
