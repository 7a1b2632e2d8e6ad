"""A checkpoint saved at any layout is restored bit for bit at any other, and training continues equally.

Every layout of 1, 2, 4 and 8 ranks, with ZeRO 1 and 2, saves a state in which no two elements of a kind are
equal, and every layout reads the checkpoints of all others. `make test` tries a few layouts, `make test-all`
all of them.
"""

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.checkpoints import (
    build_engine,
    differing,
    fill,
    saver_of,
    state_at,
    unique_router_state,
    unique_state,
)
from tests.layouts import groups_of, with_parallel, with_split
from tests.ranks import run_ranks
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.moe.config import ModelConfig
from turnout.training.batches import split_microbatches
from turnout.training.checkpoint.directory import list_checkpoints, read_checkpoint, verify_checkpoint
from turnout.training.checkpoint.rank_state import rank_state_of, restore
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout, divisors, plan_layout
from turnout.training.run_control import take_over
from turnout.training.step import advance_router_state, train_step

CFG = run_config(
    model={
        "n_heads": 8,
        "n_kv_heads": 8,
        "d_head": 4,
        "n_experts": 8,
        "n_shared_experts": 1,
        "n_dense_layers": 1,
        "n_layers": 2,
        "d_ff": 24,
        "qk_norm": True,
        "seq_len": 16,
        "balance": {"coef": 0.1, "scope": "batch", "bias_rate": 0.01},
    },
    train={"n_steps": 5, "batch_tokens": 128, "microbatch_seqs": 1},
)
LAYOUTS = [Layout(n, tp=tp, ep=ep) for n in (1, 2, 4, 8) for tp in divisors(n) for ep in divisors(n)]
FEW = [
    *(Layout(1), Layout(2, ep=2), Layout(4, tp=2, ep=2), Layout(4, tp=4), Layout(4, tp=2, ep=4)),
    *(Layout(8, tp=2, ep=4), Layout(8, tp=4, ep=8)),
]
SETS = {"few": FEW, "all": LAYOUTS}
SETS_TRIED = [pytest.param("few"), pytest.param("all", marks=pytest.mark.long)]
STEP = 3
N_STEPS_AFTER = 5


def at(layout: Layout, zero_stage: int) -> RunConfig:
    return with_parallel(CFG, tp=layout.tp, ep=layout.ep, zero_stage=zero_stage)


def name_of(layout: Layout, zero_stage: int) -> str:
    return f"world{layout.world_size}-tp{layout.tp}-ep{layout.ep}-zero{zero_stage}"


manifest_of = lru_cache(None)(read_checkpoint)  # once per process: reading is half of the time


def save_and_read(
    rank: int, layout: Layout, place: Path, tokens: dict[str, str], saves: bool
) -> dict[str, list[str]]:
    """Save at this layout, or read every checkpoint in place; return what differs, by saved layout."""
    groups, wrong = groups_of(layout, rank), {}
    for zero_stage in (1, 2):
        cfg = at(layout, zero_stage)
        engine, state, router_state = build_engine(cfg, groups), unique_state(cfg), unique_router_state(cfg)
        if saves:
            fill(engine, groups, state)
            name = name_of(layout, zero_stage)
            saver = saver_of(place / name, groups, cfg, token=tokens[name])
            saver.save(rank_state_of(engine, router_state, groups), state_at(STEP))
            saver.close()
        else:
            for run_dir in sorted(place.iterdir()):
                (path,) = list_checkpoints(run_dir)
                engine.make_optimizer_state((), {})
                got = restore(TensorReader(path, manifest_of(path)), engine, router_state, groups)
                found = differing(engine, groups, state)
                found += [] if torch.equal(got.bias_ME, router_state.bias_ME) else ["bias"]
                found += [] if torch.equal(got.load_frac_ME, router_state.load_frac_ME) else ["load"]
                wrong[run_dir.name] = found
        engine.close()
    return wrong


def train_on(
    rank: int, layout: Layout, zero_stage: int, run_dir: Path | None = None, token: str = ""
) -> list[float]:
    """Continue at this layout from a run's checkpoint, or from the state itself; return the losses."""
    groups = groups_of(layout, rank)
    # One micro-batch a step, or two: collectives of many ranks are slow on few cores.
    n_seqs = CFG.train.batch_tokens // CFG.model.seq_len // layout.dp
    cfg = with_split(at(layout, zero_stage), max(1, n_seqs // zero_stage))
    engine, state, losses = build_engine(cfg, groups), unique_router_state(cfg), []
    if run_dir is None:
        fill(engine, groups, unique_state(cfg))
    else:
        saver = saver_of(run_dir, groups, cfg, token=token)
        found = saver.find_intact()
        assert found is not None
        saver.close()
        state = restore(TensorReader(*found), engine, state, groups)
    for step in range(STEP, STEP + N_STEPS_AFTER):
        batch = rank_batch(uneven_batch(cfg, step), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(batch, cfg.train.microbatch_seqs)
        result = train_step(engine, microbatches, state, step=step + 1, lr=1e-3, groups=groups)
        state = advance_router_state(state, result, cfg.model.balance)
        losses.append(float(result.loss))
    engine.close()
    return losses


Saved = tuple[list[Layout], Path, dict[str, str]]


@pytest.fixture(scope="module", params=SETS_TRIED)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The same state, saved at every layout of a set, each in a run directory of its own."""
    layouts, place = SETS[request.param], tmp_path_factory.mktemp("saved")
    tokens = {}
    for layout in layouts:
        for zero_stage in (1, 2):
            (place / (name := name_of(layout, zero_stage))).mkdir()
            tokens[name] = take_over(place / name)
    for layout in layouts:
        run_ranks(save_and_read, layout.world_size, layout, place, tokens, saves=True)
    return layouts, place, tokens


def test_every_layout_reads_what_every_other_saved(saved: Saved) -> None:
    layouts, place, tokens = saved
    for layout in layouts:
        for wrong in run_ranks(save_and_read, layout.world_size, layout, place, tokens, saves=False):
            assert len(wrong) == 2 * len(layouts)
            assert not any(wrong.values()), (name_of(layout, 0), wrong)


def test_each_element_is_written_once_and_each_byte_verifies(saved: Saved) -> None:
    _, place, _ = saved
    n_parameters = sum(x.numel() for (kind, _), x in unique_state(CFG).items() if kind == "master")
    for run_dir in place.iterdir():
        (path,) = list_checkpoints(run_dir)
        manifest = verify_checkpoint(path)
        held = [shard.numel for entry in manifest.tensors.values() for _, shard in entry.held_shards()]
        assert sum(held) == n_parameters


def test_the_next_steps_are_the_same_at_any_layout(saved: Saved) -> None:
    """Each layout resumes from the checkpoint of another one, further down the list."""
    layouts, place, tokens = saved
    shift = min(7, len(layouts) // 2)
    plans = [(layout, 1 + i % 2) for i, layout in enumerate(layouts)]
    (want,) = run_ranks(train_on, 1, *plans[0])
    assert len(set(want)) == N_STEPS_AFTER
    for i, (layout, zero_stage) in enumerate(plans):
        source = name_of(*plans[(i + shift) % len(plans)])
        got = run_ranks(train_on, layout.world_size, layout, zero_stage, place / source, tokens[source])
        for losses in got:
            assert losses == pytest.approx(want, rel=1e-5), name_of(layout, zero_stage)


def test_a_checkpoint_of_another_model_is_refused_by_parameter(saved: Saved) -> None:
    _, place, _ = saved
    (path,) = list_checkpoints(place / name_of(LAYOUTS[0], 1))
    model: ModelConfig = CFG.model.model_copy(update={"d_expert": 16})
    (message,) = run_ranks(refusal, 1, CFG.model_copy(update={"model": model}), path)
    assert "parameter blocks.1.moe.experts.down is (8, 16, 8), but this model's is (8, 16, 16)" in message


def test_a_state_that_is_not_adamws_is_refused(saved: Saved) -> None:
    _, place, _ = saved
    (path,) = list_checkpoints(place / name_of(LAYOUTS[0], 1))
    (message,) = run_ranks(refusal, 1, CFG, path, kinds=("master", "exp_avg"))
    assert "holds ['exp_avg', 'step'], but AdamW keeps ['exp_avg', 'exp_avg_sq', 'step']" in message


def refusal(rank: int, cfg: RunConfig, path: Path, **lies: object) -> str:
    groups = groups_of(plan_layout(cfg, 1), rank)
    engine = build_engine(cfg, groups)
    try:
        manifest = read_checkpoint(path).model_copy(update=lies)
        restore(TensorReader(path, manifest), engine, unique_router_state(cfg), groups)
    except ValueError as err:
        return str(err)
    finally:
        engine.close()
    return ""
