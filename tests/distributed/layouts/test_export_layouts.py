"""Exports do not depend on the layout that saved a checkpoint; an import trains as the original does."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import build_engine, fill, saver_of, state_at, unique_router_state, unique_state
from tests.exports import run_config_of, save_weights, variant_config, variant_weights
from tests.layouts import groups_of, with_parallel
from tests.ranks import run_ranks
from tests.runs import rank_batch, uneven_batch
from turnout.launch.settings import to_toml
from turnout.training.batches import split_microbatches
from turnout.training.checkpoint.directory import checkpoint_path, verify_checkpoint
from turnout.training.checkpoint.manifest import Attached, DataIdentity
from turnout.training.checkpoint.rank_state import rank_state_of, restore
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.checkpoint.weights import CheckpointWeights
from turnout.training.config.run import RunConfig
from turnout.training.export.gguf_file import Kind, write_gguf
from turnout.training.export.huggingface import write_huggingface
from turnout.training.export.reader import HfWeights
from turnout.training.export.to_checkpoint import write_first_checkpoint
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over
from turnout.training.step import train_step

NAME = "glm4-all"
CFG = run_config_of(variant_config(NAME).model_copy(update={"seq_len": 42, "vocab_size": 304}))
LAYOUTS = [(Layout(1), 1), (Layout(2, tp=2), 2), (Layout(2, ep=2), 1), (Layout(4, tp=2, ep=4), 2)]
STEP = 3


def save_at(rank: int, layout: Layout, zero_stage: int, run_dir: Path, token: str, files: dict) -> None:
    cfg = with_parallel(CFG, tp=layout.tp, ep=layout.ep, zero_stage=zero_stage)
    groups = groups_of(layout, rank)
    engine = build_engine(cfg, groups)
    fill(engine, groups, unique_state(cfg))
    attached = Attached(DataIdentity(corpus_hash="none", tokenizer_sha256="none"), files)
    saver = saver_of(run_dir, groups, cfg, token=token, attached=attached)
    saver.save(rank_state_of(engine, unique_router_state(cfg), groups), state_at(STEP))
    saver.close()
    engine.close()


def test_exports_of_every_layout_are_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    files = {"config.toml": to_toml(CFG).encode(), "tokenizer.model": tokenizer.read_bytes()}
    found: dict[str, set[str]] = {}
    for number, (layout, zero_stage) in enumerate(LAYOUTS):
        (run_dir := tmp_path / f"run{number}").mkdir()
        run_ranks(save_at, layout.world_size, layout, zero_stage, run_dir, take_over(run_dir), files)
        weights = CheckpointWeights(checkpoint_path(run_dir, STEP), CFG.model)
        (out := tmp_path / f"out{number}").mkdir()
        write_huggingface(weights, "glm4_moe", out, dtype=torch.float32, max_shard_bytes=100_000)
        write_gguf(weights, "glm4_moe", out, kind=Kind.Q8_0)
        for path in out.iterdir():
            found.setdefault(path.name, set()).add(hashlib.sha256(path.read_bytes()).hexdigest())
        for name in ("embed.weight", "blocks.1.moe.experts.gate_up", "blocks.2.attn.o.weight"):
            assert torch.equal(weights.read(name), unique_state(CFG)["master", name]), name
    assert len(found) > 8
    assert all(len(digests) == 1 for digests in found.values()), found


def step_from(rank: int, layout: Layout, path: Path, cfg: RunConfig) -> dict[str, Tensor]:
    """Train one step from a checkpoint; return this rank's fragments of the parameters."""
    cfg = with_parallel(cfg, tp=layout.tp, ep=layout.ep, zero_stage=1)
    groups = groups_of(layout, rank)
    engine = build_engine(cfg, groups)
    reader = TensorReader(path, verify_checkpoint(path))
    state = restore(reader, engine, unique_router_state(cfg), groups)
    own_batch = rank_batch(uneven_batch(cfg, 0), layout.dp_rank(rank), layout.dp)
    microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
    train_step(engine, microbatches, state, step=1, lr=1e-2, groups=groups)
    found = {fragment.name: fragment.values["master"].clone() for fragment in engine.fragments()}
    engine.close()
    return found


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, ep=2)], ids=["ep1", "ep2"])
def test_a_step_from_an_import_is_that_from_the_checkpoint(
    layout: Layout, tokenizer: Path, tmp_path: Path
) -> None:
    weights = variant_weights(NAME, tokenizer)
    cfg = run_config_of(weights.cfg)
    original = save_weights(weights, tmp_path / "original")
    (source := tmp_path / "hf").mkdir()
    write_huggingface(CheckpointWeights(original, weights.cfg), "glm4_moe", source, dtype=torch.float32)
    attached = Attached(
        DataIdentity(corpus_hash="none", tokenizer_sha256="none"), {"config.toml": to_toml(cfg).encode()}
    )
    imported = write_first_checkpoint(
        HfWeights(source), tmp_path / "imported", attached, max_file_bytes=90_000
    )
    assert len(list(imported.glob("rank-*"))) > 3
    after = {}
    for run_dir, path in (("original", original), ("imported", imported)):
        after[run_dir] = run_ranks(step_from, layout.world_size, layout, path, cfg)
    for one, other in zip(after["original"], after["imported"], strict=True):
        assert one.keys() == other.keys()
        assert not [name for name in one if not torch.equal(one[name], other[name])]
    whole = weights.read("embed.weight").flatten()
    moved = after["imported"][0]["decoder.embed.weight"]
    assert not torch.equal(moved, whole[: moved.numel()]), "a step that changes nothing proves nothing"
