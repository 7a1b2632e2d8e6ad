"""The memory that `--dry-run` predicts for a rank, against what the real engine holds, to the byte."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.bench.step_memory import SMALL, measure
from tests.checkpoints import APPLIED_STEPS, KINDS, saver_of, state_at, unique_router_state
from tests.layouts import groups_of, starting_state
from tests.memory import all_tensors, held_by, peak_allocated_bytes, storages
from tests.ranks import run_ranks
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.launch.estimate.activations import activation_bytes
from turnout.launch.estimate.memory import StateBytes, state_bytes
from turnout.training.batches import split_microbatches
from turnout.training.checkpoint.directory import checkpoint_bytes, checkpoint_path, read_checkpoint
from turnout.training.checkpoint.rank_state import rank_state_of
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_engine, build_local_decoder
from turnout.training.hardware import DTYPES, cpu_has_fp16
from turnout.training.objective import Objective
from turnout.training.parallel.layout import Layout, plan_layout
from turnout.training.run_control import take_over

LAYOUTS = [
    pytest.param(1, {}, id="dp1"),
    pytest.param(2, {}, id="dp2"),
    pytest.param(2, {"ep": 2}, id="ep2"),
    pytest.param(2, {"tp": 2}, id="tp2"),
    pytest.param(4, {"tp": 2, "ep": 2}, id="tp2-ep2", marks=pytest.mark.long),
]
# Odd sizes, so that a rank's partition begins within a parameter and the last one ends in padding.
ODD = {"d_model": 9, "n_heads": 2, "d_head": 8, "d_expert": 11, "vocab_size": 46, "n_experts": 6}
ODD |= {"n_dense_layers": 1, "d_ff": 14, "n_layers": 2, "qk_norm": True, "n_kv_heads": 2}


def held_in_second_step(rank: int, cfg: RunConfig, world_size: int) -> tuple[StateBytes, int]:
    """Take a step. Return the most that is held while the next one accumulates, and its micro-batches."""
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank)
    before = all_tensors()
    engine, _ = build_engine(cfg, groups)
    state, held = starting_state(cfg), list[StateBytes]()
    for step in range(2):
        own_batch = rank_batch(uneven_batch(cfg, step), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
        loaded = [t for mb in microbatches for t in (mb.tokens, mb.targets, mb.doc_ids, mb.sample_ids)]
        known = before | storages([state.bias_ME, state.load_frac_ME, *loaded])
        for i, microbatch in enumerate(microbatches):
            engine.backward(engine.forward(microbatch, state).total / 100)
            if step == 1:
                held.append(held_by(engine, groups, known))
            if i + 1 < len(microbatches):
                engine.finish_microbatch()
        assert engine.step(lr=0.01).was_applied or cfg.train.precision == "fp16"
    engine.close()
    return max(held, key=lambda h: h.gradients), len(held)


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.long)])
@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_ranks_hold_what_was_planned_to_the_byte(
    world_size: int, parallel: dict[str, Any], precision: str
) -> None:
    if precision == "fp16" and not cpu_has_fp16():
        pytest.skip("this CPU does not compute in fp16")
    for zero_stage in (1, 2):
        cfg = run_config(
            model=ODD,
            train={"precision": precision, "batch_tokens": 12 * 4 * world_size, "microbatch_seqs": 1},
            parallel={**parallel, "zero_stage": zero_stage},
        )
        layout = plan_layout(cfg, world_size)
        for rank, (held, n) in enumerate(run_ranks(held_in_second_step, world_size, cfg, world_size)):
            assert n > 1
            assert held == state_bytes(cfg, layout, rank), f"ZeRO-{zero_stage}, rank {rank}"


# Large enough that activations need more memory than the scratch space of operators.
WIDE = {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_head": 16, "d_expert": 48}
WIDE |= {"vocab_size": 512, "seq_len": 128, "n_shared_experts": 1, "n_dense_layers": 1, "d_ff": 96}


def passes_of_a_microbatch(rank: int, cfg: RunConfig, world_size: int) -> int:
    """Return the most bytes that forward and backward allocate when gradients exist already."""
    layout = plan_layout(cfg, world_size)
    decoder = build_local_decoder(cfg, groups_of(layout, rank), DTYPES[cfg.train.precision])
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    objective, state = Objective(decoder), starting_state(cfg)
    own_batch = rank_batch(uneven_batch(cfg, 0), layout.dp_rank(rank), layout.dp)
    all_reduce = dist.all_reduce

    def all_reduce_to_the_end(*args: Any, **kwargs: Any) -> None:
        all_reduce(*args, **kwargs)
        time.sleep(0.005)  # gloo's thread releases the tensor only when it runs again

    with patch.object(dist, "all_reduce", all_reduce_to_the_end):
        # The minimum of several, because threads of other collectives may keep a tensor, too.
        return min(
            peak_allocated_bytes(lambda: objective(own_batch, state).total.backward()) for _ in range(5)
        )


PASSES = {
    "alone": (1, {}, "fp32", "sorted_loop"),
    "grouped": (1, {}, "bf16", "torch_grouped"),
    "ep2": (2, {"ep": 2}, "fp32", "sorted_loop"),
    "tp2": (2, {"tp": 2}, "fp32", "sorted_loop"),
    "sp2-ep4": (4, {"tp": 2, "ep": 4, "sequence_parallel": True}, "bf16", "sorted_loop"),
}
IN_EACH_RUN = {("alone", "none"), ("grouped", "full"), ("ep2", "none"), ("tp2", "full"), ("sp2-ep4", "none")}


@pytest.mark.parametrize(
    ("world_size", "parallel", "precision", "backend", "recompute"),
    [
        pytest.param(
            *case,
            recompute,
            id=f"{name}-{recompute}",
            marks=() if (name, recompute) in IN_EACH_RUN else pytest.mark.long,
        )
        for name, case in PASSES.items()
        for recompute in ("none", "selective", "full")
    ],
)
def test_passes_take_the_activations_that_were_planned(
    world_size: int, parallel: dict[str, Any], precision: str, backend: str, recompute: str
) -> None:
    train = {"precision": precision, "expert_backend": backend, "recompute": recompute, "microbatch_seqs": 4}
    layout = Layout(world_size, tp=parallel.get("tp", 1), ep=parallel.get("ep", 1))
    train["batch_tokens"] = 4 * layout.dp * WIDE["seq_len"]
    n_experts = {"n_experts": 4, "top_k": 4}  # every token goes to every expert, which is uniform
    cfg = run_config(model={**WIDE, **n_experts}, train=train, parallel=parallel)
    measured = run_ranks(passes_of_a_microbatch, world_size, cfg, world_size)
    predicted = activation_bytes(cfg, layout)
    if cfg.parallel.sequence_parallel and recompute == "full":
        # gloo gathers and scatters into copies of its own, which exist at the peak, when a block is
        # recomputed.
        assert predicted == pytest.approx(min(measured), rel=0.15)
        return
    assert measured == pytest.approx([predicted] * world_size, rel=0.02)


@pytest.mark.long
def test_a_step_takes_the_memory_that_was_planned() -> None:
    for name, measured, predicted in measure(SMALL):
        assert predicted == pytest.approx(measured, rel=0.1), name


def save_whole(rank: int, cfg: RunConfig, run_dir: Path, token: str) -> None:
    """Save step 3 of a model that has taken a step."""
    groups = groups_of(plan_layout(cfg, 2), rank)
    engine, _ = build_engine(cfg, groups)
    engine.make_optimizer_state(KINDS, {"step": APPLIED_STEPS})
    saver = saver_of(run_dir, groups, cfg, token=token)
    saver.save(rank_state_of(engine, unique_router_state(cfg), groups), state_at(3))
    saver.close()
    engine.close()


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1)])
def test_a_checkpoint_has_the_bytes_that_were_planned(tp: int, ep: int, tmp_path: Path) -> None:
    # Large enough that names and hashes do not matter.
    sizes = {"d_model": 64, "d_expert": 96, "vocab_size": 512, "n_shared_experts": 1, "n_dense_layers": 1}
    cfg = run_config(model={**sizes, "d_ff": 48, "n_kv_heads": 2}, parallel={"tp": tp, "ep": ep})
    assert checkpoint_bytes(cfg.model) > 2**21
    run_ranks(save_whole, 2, cfg, tmp_path, take_over(tmp_path))
    manifest = read_checkpoint(checkpoint_path(tmp_path, 3))
    assert manifest.n_bytes == pytest.approx(checkpoint_bytes(cfg.model), rel=0.02)
