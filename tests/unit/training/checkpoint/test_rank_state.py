"""A checkpoint restored into a real one-rank engine: all elements match, or the error names what differs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import (
    APPLIED_STEPS,
    build_engine,
    differing,
    fill,
    saver_of,
    state_at,
    unique_router_state,
    unique_state,
)
from tests.layouts import groups_of
from tests.runs import run_config
from turnout.training.checkpoint.directory import checkpoint_path, read_checkpoint
from turnout.training.checkpoint.rank_state import rank_state_of, restore
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.config.run import RunConfig
from turnout.training.engine.engine import Engine
from turnout.training.errors import CheckpointError
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over

CFG = run_config()
FP16 = run_config(train={"precision": "fp16"})
SCALER = {"cur_scale": 1024.0, "cur_iter": 41.0, "last_overflow_iter": 7.0, "cur_hysteresis": 1.0}


def engine_of(cfg: RunConfig) -> Engine:
    return build_engine(cfg, groups_of(Layout(1), 0))


@pytest.fixture(scope="module")
def saved(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which no two elements of a kind are equal."""
    run_dir, groups = tmp_path_factory.mktemp("saved"), groups_of(Layout(1), 0)
    engine = engine_of(CFG)
    fill(engine, groups, unique_state(CFG))
    saver = saver_of(run_dir, groups, CFG, token=take_over(run_dir))
    saver.save(rank_state_of(engine, unique_router_state(CFG), groups), state_at(3, loss_scaler=SCALER))
    saver.close()
    engine.close()
    return checkpoint_path(run_dir, 3)


def restore_into(saved: Path, engine: Engine, cfg: RunConfig, **lies: Any) -> None:
    """Restore a checkpoint, with lies in its manifest, and check the router state."""
    manifest = read_checkpoint(saved).model_copy(update=lies)
    want = unique_router_state(cfg)
    got = restore(TensorReader(saved, manifest), engine, want, groups_of(Layout(1), 0))
    assert torch.equal(got.bias_ME, want.bias_ME) and torch.equal(got.load_frac_ME, want.load_frac_ME)


def test_every_element_is_restored(saved: Path) -> None:
    engine = engine_of(CFG)
    restore_into(saved, engine, CFG)
    assert differing(engine, groups_of(Layout(1), 0), unique_state(CFG)) == []
    assert engine.optimizer_scalars() == {"step": APPLIED_STEPS}
    masters = unique_state(CFG)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, masters["master", name.removeprefix("decoder.")]), name
    engine.close()


def test_the_loss_scale_of_fp16_is_restored(saved: Path) -> None:
    engine = engine_of(FP16)
    assert engine.loss_scaler_state().keys() == SCALER.keys() and engine.loss_scaler_state() != SCALER
    restore_into(saved, engine, FP16)
    assert engine.loss_scaler_state() == SCALER
    engine.close()


@pytest.mark.parametrize(
    ("lies", "words"),
    [
        pytest.param({"kinds": ("master", "exp_avg")}, "holds ['exp_avg', 'step'], but", id="half of it"),
        pytest.param({"kinds": ("master",)}, "holds ['step'], but", id="only its step"),
        pytest.param(
            {"kinds": ("master", "exp_avg", "momentum")},
            "holds ['exp_avg', 'momentum', 'step'], but",
            id="another optimizer's",
        ),
        pytest.param(
            {"state": state_at(3, optimizer={})},
            "holds ['exp_avg', 'exp_avg_sq'], but",
            id="without its step",
        ),
    ],
)
def test_a_state_that_is_not_adamws_is_refused(lies: dict[str, Any], words: str, saved: Path) -> None:
    engine = engine_of(CFG)
    with pytest.raises(CheckpointError) as caught:
        restore_into(saved, engine, CFG, **lies)
    assert words in str(caught.value)
    engine.close()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        pytest.param(
            {"d_expert": 16},
            "experts.down is (6, 16, 8), but this model's is (6, 16, 16)",
            id="another size",
        ),
        pytest.param(
            {"n_layers": 1}, "blocks.1.attn.k.weight is (8, 16), but this model's is absent", id="more layers"
        ),
        pytest.param(
            {"qk_norm": True}, "attn.k_norm.weight is absent, but this model's is (8,)", id="a missing norm"
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_parameter(
    model: dict[str, Any], words: str, saved: Path
) -> None:
    cfg = run_config(model=model)
    engine = engine_of(cfg)
    with pytest.raises(CheckpointError) as caught:
        restore_into(saved, engine, cfg)
    assert words in str(caught.value)
    engine.close()
