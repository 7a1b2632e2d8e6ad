"""A whole run of one rank in this process: a resume must restore everything that the next steps depend on."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.layouts import groups_of
from tests.runs import read_rows, run_config
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.data.skips import SkippedWindow, write_skips
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.run_dir import attachments, create_run_dir
from turnout.training.checkpoint.directory import checkpoint_path, read_checkpoint
from turnout.training.config.run import RunConfig
from turnout.training.loop import SKIPPED_FILE, Observer, train
from turnout.training.metrics import Row
from turnout.training.optimizers.schedule import lr_at
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import FencingToken, ask_to_stop, take_over

N_STEPS, STOPPED_AFTER = 12, 5
# Data step 7 is left out, so every later step reads the one after its own.
LEFT_OUT = (SkippedWindow(7, 7, "a test"),)


@pytest.fixture(scope="module")
def corpus(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    texts = {"one": make_texts(60), "two": make_texts(40, seed=1)}
    return make_corpus(tmp_path_factory.mktemp("corpus"), texts, valid_frac=0.1)


def config(corpus: Corpus, **changes: Any) -> RunConfig:
    """Return a run in which all that is carried from step to step has an effect on later steps."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": 300,
            "balance": {"scope": "batch", "coef": 0.1, "z_coef": 0.01, "bias_rate": 0.02},
        },
        "train": {"n_steps": N_STEPS, "batch_tokens": 96, "microbatch_seqs": 4},
        "optim": {"lr": 0.01, "schedule": {"warmup_steps": 3}},
        "data": {"corpus": str(corpus.path)},
        "guard": {"on_spike": "stop", "spike_sigma": 1000.0, "spike_window_steps": 3},
        "checkpoint": {"every_steps": 100},
        "log": {"every_steps": 1},
        "eval": {"max_documents": 3},
        "sample": {"prompts": ("the train",), "n_tokens": 6},
    }
    return run_config(**{name: {**sections.get(name, {}), **changes.get(name, {})} for name in sections})


@dataclass
class Watched:
    """What a run reported."""

    rows: list[Row] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def run(cfg: RunConfig, run_dir: Path, *, stop_after: int | None = None) -> Watched:
    """Train in this process, from the newest checkpoint if there is one; ask it to stop after a step."""
    attempt_dir, watched = make_attempt_dir(run_dir / "logs"), Watched()
    fencing_token = FencingToken(run_dir, take_over(run_dir))
    fencing_token.hand_over(attempt_dir)

    def on_row(row: Row) -> None:
        watched.rows.append(row)
        if row["step"] == stop_after:
            ask_to_stop(attempt_dir)

    observer = Observer(
        on_row,
        lambda prompt, text: watched.texts.append(prompt + text),
        watched.events.append,
        lambda status: None,
    )
    groups, attached = groups_of(Layout(1), 0), attachments(run_dir, cfg)
    train(
        cfg,
        run_dir,
        groups,
        observer,
        fencing_token=fencing_token,
        attached=attached,
        attempt_dir=attempt_dir,
    )
    return watched


def start(cfg: RunConfig, run_dir: Path, corpus: Corpus) -> Path:
    create_run_dir(run_dir, cfg, corpus, nproc=1)
    write_skips(run_dir / SKIPPED_FILE, LEFT_OUT)
    return run_dir


@pytest.fixture(scope="module")
def straight(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watched]:
    run_dir = start(config(corpus), tmp_path_factory.mktemp("straight") / "run", corpus)
    return run_dir, run(config(corpus), run_dir)


def without_timings(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "mem/"))} for row in rows]


def tensors_of(run_dir: Path, step: int = N_STEPS) -> dict[str, torch.Tensor]:
    paths = checkpoint_path(run_dir, step).glob("*.safetensors")
    return {f"{path.name}:{key}": t for path in paths for key, t in load_file(path).items()}


def test_a_stopped_run_resumes_bit_for_bit(
    corpus: Corpus, straight: tuple[Path, Watched], tmp_path: Path
) -> None:
    cfg, (want_dir, want) = config(corpus), straight
    run_dir = start(cfg, tmp_path / "run", corpus)
    first = run(cfg, run_dir, stop_after=STOPPED_AFTER)
    assert [row["step"] for row in first.rows] == list(range(1, STOPPED_AFTER + 1))
    # The checkpoint alone must know what is left out.
    (run_dir / SKIPPED_FILE).unlink()
    second = run(cfg, run_dir)
    assert [row["step"] for row in second.rows] == list(range(STOPPED_AFTER + 1, N_STEPS + 1))
    assert without_timings(read_rows(run_dir)) == without_timings(read_rows(want_dir))
    got_tensors, want_tensors = tensors_of(run_dir), tensors_of(want_dir)
    assert got_tensors.keys() == want_tensors.keys()
    assert [name for name in want_tensors if not torch.equal(got_tensors[name], want_tensors[name])] == []
    got_state, want_state = (read_checkpoint(checkpoint_path(d, N_STEPS)).state for d in (run_dir, want_dir))
    assert got_state == want_state
    assert second.texts == want.texts


def test_the_loss_scale_of_fp16_goes_on_where_it_stood(corpus: Corpus, tmp_path: Path) -> None:
    train_in_fp16 = {"precision": "fp16", "n_steps": 4}
    cfg = config(corpus, train=train_in_fp16, sample={"prompts": ()}, eval={"max_documents": 1})
    straight, stopped = (start(cfg, tmp_path / name, corpus) for name in ("straight", "stopped"))
    run(cfg, straight)
    run(cfg, stopped, stop_after=2)
    run(cfg, stopped)
    state = read_checkpoint(checkpoint_path(straight, 4)).state
    assert state.loss_scaler["cur_iter"] == 4 and state.loss_scaler["cur_scale"] > 1
    assert read_checkpoint(checkpoint_path(stopped, 4)).state == state


def test_a_row_holds_what_the_config_promises(corpus: Corpus, straight: tuple[Path, Watched]) -> None:
    cfg, (run_dir, _) = config(corpus), straight
    rows = read_rows(run_dir)
    for row in rows:
        step = int(row["step"])
        lr = lr_at(step - 1, lr=0.01, schedule=cfg.optim.schedule, n_steps=N_STEPS)
        assert row["train/lr"] == pytest.approx(lr)
        assert row["train/tokens_seen"] == step * cfg.train.batch_tokens
        assert math.isfinite(row["train/loss"])
    state = read_checkpoint(checkpoint_path(run_dir, N_STEPS)).state
    assert state.tokens_seen == N_STEPS * cfg.train.batch_tokens
    assert state.optimizer == {"step": N_STEPS}
    assert state.skipped == LEFT_OUT
    assert state.guard["n_losses"] == N_STEPS, "the guard has seen every loss"
    assert [row["step"] for row in rows if "eval/loss" in row] == [N_STEPS]


def test_a_skipped_step_changes_no_weight_and_no_router_state(corpus: Corpus, tmp_path: Path) -> None:
    cfg = config(
        corpus,
        guard={"on_spike": "skip", "spike_sigma": 0.3, "spike_window_steps": 2, "max_interventions": 100},
        checkpoint={"every_steps": 1, "keep_last": 100},
        optim={"lr": 0.2},  # so high that the loss also rises
    )
    run_dir = start(cfg, tmp_path / "run", corpus)
    watched = run(cfg, run_dir)
    skipped = {int(event.split()[1].rstrip(":")) for event in watched.events if "was skipped" in event}
    assert 0 < len(skipped) < N_STEPS - 1
    assert watched.rows[-1]["train/skipped_steps"] == len(skipped)
    for step in range(2, N_STEPS + 1):
        before, after = tensors_of(run_dir, step - 1), tensors_of(run_dir, step)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert (not changed) if step in skipped else {"router.safetensors:bias"} < changed, f"step {step}"
