"""What `--dry-run` says that a rank holds, against what ranks of the real engine hold, to the byte."""

from typing import Any

import pytest

from launch.memory import StateBytes, state_bytes
from tests.layouts import groups_of, starting_state
from tests.memory import all_tensors, held_by, storages
from tests.ranks import run_ranks
from tests.runs import rank_share, run_config, uneven_batch
from training.batches import split_microbatches
from training.build import build_engine
from training.config import RunConfig
from training.hardware import cpu_has_fp16
from training.parallel import plan_layout

LAYOUTS = [
    pytest.param(1, {}, id="dp1"),
    pytest.param(2, {}, id="dp2"),
    pytest.param(2, {"ep": 2}, id="ep2"),
    pytest.param(2, {"tp": 2}, id="tp2"),
    pytest.param(4, {"tp": 2, "ep": 2}, id="tp2-ep2"),
]
# Odd sizes, so that shares begin within a parameter and the last one ends in padding.
ODD = {"d_model": 9, "n_heads": 2, "d_head": 8, "d_expert": 11, "vocab_size": 46, "n_experts": 6}
ODD |= {"n_dense_layers": 1, "d_ff": 14, "n_layers": 2, "qk_norm": True, "n_kv_heads": 2}


def held_in_second_step(rank: int, cfg: RunConfig, world_size: int) -> tuple[StateBytes, int]:
    """Take a step, and return the most that is held while the next one accumulates; and the micro-batches."""
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank)
    before = all_tensors()
    engine, _ = build_engine(cfg, groups)
    state, held = starting_state(cfg), list[StateBytes]()
    for step in range(2):
        share = rank_share(uneven_batch(cfg, step), layout.dp_rank(rank), layout.dp)
        microbatches = split_microbatches(share, cfg.train.microbatch_seqs)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
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
