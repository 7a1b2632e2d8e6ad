"""The memory of a training step against the estimate of `--dry-run`: `python -m tests.bench step-memory`
measures some configs in a process of their own.

Measured is the resident memory above what the process had before the model was built, after a small model of
the same precision has loaded all code. malloc returns what is freed. oneDNN's cache is off: in half precision
it keeps compiled code and buffers for each number of rows that an expert ever had, which is not part of a
step and grows for hundreds of steps.
"""

import ctypes
import gc
from typing import Any

import torch

from tests.bench.rows import Row
from tests.bench.side_by_side import GLIBC_DEFAULTS, MIB, in_own_process, peak_extra_bytes, resident_bytes
from tests.layouts import groups_of, starting_state
from tests.ranks import RANK_ENV, join_alone
from tests.runs import run_config, uneven_batch
from turnout.launch.estimate.activations import activation_bytes
from turnout.launch.estimate.memory import peak_bytes
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_engine
from turnout.training.engine.engine import Engine
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout, n_microbatches
from turnout.training.step import train_step

SMALL = {"n_layers": 3, "d_model": 256, "n_heads": 4, "n_kv_heads": 4, "d_head": 64, "d_expert": 256}
SMALL |= {"n_experts": 16, "top_k": 2, "vocab_size": 8000, "seq_len": 256}
LARGE = {**SMALL, "n_layers": 8, "d_model": 512, "d_expert": 512, "n_heads": 8, "n_kv_heads": 8}
WARM = {**SMALL, "n_layers": 1, "d_model": 32, "d_expert": 16, "vocab_size": 64}
# precision, ZeRO stage, recomputation, sequences of a micro-batch, micro-batches
CASES = [
    ("fp32", 1, "none", 8, 2),
    ("fp32", 1, "full", 8, 2),
    ("fp32", 2, "selective", 2, 2),
    ("bf16", 1, "none", 8, 1),
    ("bf16", 2, "none", 2, 2),
]
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "LRU_CACHE_CAPACITY": "1",
}
ENVIRONMENT |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}


def step_memory_rows() -> list[Row]:
    rows = []
    for case, measured, estimated in measure(LARGE):
        note = f"{estimated / MIB:,.0f} and {measured / MIB:,.0f} MiB"
        error = abs(estimated / measured - 1)
        rows.append(Row.of(f"error of --dry-run's memory, {case}", [error], at_most=0.1, note=note))
    return rows


def measure(model: dict[str, int]) -> list[tuple[str, int, int]]:
    """Return the name of each case, its measured bytes and its estimated bytes."""
    rank = {**RANK_ENV, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return in_own_process(measure_here, model, malloc={**GLIBC_DEFAULTS, **rank, **ENVIRONMENT})


def measure_here(model: dict[str, int]) -> list[tuple[str, int, int]]:
    torch.set_num_threads(1)
    join_alone()
    groups, results = groups_of(Layout(1), 0), []
    for case in CASES:
        _train(_config(WARM, *case), groups)
        cfg = _config(model, *case)
        return_freed_memory()
        before = resident_bytes("VmRSS")
        measured = _train(cfg, groups) - before
        estimated = peak_bytes(cfg, Layout(1), 0, activation_bytes(cfg, Layout(1)))
        results.append((" ".join(map(str, case)), measured, estimated))
    return results


def _config(
    model: dict[str, int], precision: str, zero: int, recompute: str, n_seqs: int, n: int
) -> RunConfig:
    train: dict[str, Any] = {"precision": precision, "recompute": recompute, "microbatch_seqs": n_seqs}
    train["batch_tokens"] = n_seqs * n * model["seq_len"]
    return run_config(model=model, train=train, parallel={"zero_stage": zero})


def _train(cfg: RunConfig, groups: Groups) -> int:
    """Take two steps, and return the peak of resident bytes in the second."""
    engine, _ = build_engine(cfg, groups)
    _step(cfg, engine, groups, 0)
    return_freed_memory()
    before = resident_bytes("VmRSS")
    extra = peak_extra_bytes(lambda: _step(cfg, engine, groups, 1))
    engine.close()
    return before + extra


def _step(cfg: RunConfig, engine: Engine, groups: Groups, step: int) -> None:
    microbatches = split_microbatches(uneven_batch(cfg, step), cfg.train.microbatch_seqs)
    assert len(microbatches) == n_microbatches(cfg, groups.layout)
    train_step(engine, microbatches, starting_state(cfg), step=step + 1, lr=0.01, groups=groups)


def return_freed_memory() -> None:
    """Make malloc return freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
