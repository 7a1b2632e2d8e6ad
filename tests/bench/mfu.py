"""The model FLOPs utilisation (MFU) of a training step on this CPU: `python -m tests.bench mfu`.

The `small` recipe (99 M parameters) in bf16 under the engine, one thread. Its FLOPs are counted from its
sizes; the CPU's peak is the best of some square bf16 products in the same round.
"""

import os
from collections.abc import Callable

import torch

from tests.bench.engine import engine_step
from tests.bench.rows import Row
from tests.bench.side_by_side import in_ms, time_in_turn
from tests.bench.step import synthetic_batch
from tests.layouts import groups_of
from tests.ranks import join_alone
from turnout.launch.settings import load_config
from turnout.moe.flops import flops_per_token
from turnout.training.parallel.layout import plan_layout

WAYS = {
    "sorted_loop": ["train.expert_backend=sorted_loop"],
    "compiled_loop": ["train.expert_backend=compiled_loop"],
    "train.compile": ["train.expert_backend=compiled_loop", "train.compile=true"],
}
PRODUCT_SIZES, N_PRODUCTS = (1024, 2048, 4096), 4
# One micro-batch, where the recipe has eight per step: the optimizer's part is larger here than in a run.
SETTINGS = ["data.corpus=unused", "train.batch_tokens=16384"]


def mfu_rows(n_rounds: int = 3) -> list[Row]:
    torch.set_num_threads(1)
    join_alone()
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it, and there is no launcher to set it
    cfg = load_config("small", SETTINGS)
    groups = groups_of(plan_layout(cfg, 1), rank=0)
    batch = synthetic_batch(cfg.model, cfg.batch_seqs)
    ways = {}
    for way, chosen in WAYS.items():
        ways[way] = engine_step(load_config("small", [*SETTINGS, *chosen]), groups, batch)
    products = {f"{size}": product(size) for size in PRODUCT_SIZES}
    seconds = time_in_turn(ways | products, n_rounds=n_rounds)
    speeds = [[2 * size**3 * N_PRODUCTS / s for s in seconds[f"{size}"]] for size in PRODUCT_SIZES]
    peaks = [max(of_round) for of_round in zip(*speeds, strict=True)]
    flops = flops_per_token(cfg.model) * cfg.train.batch_tokens
    return [
        Row.of(
            f"MFU of `small`, bf16, {way}",
            [flops / s / peak for s, peak in zip(seconds[way], peaks, strict=True)],
            at_least=0.45,
            note=f"{in_ms(seconds[way])} of {cfg.train.batch_tokens} tokens, "
            f"best product {sorted(peaks)[n_rounds // 2] / 1e9:,.0f} GFLOP/s",
        )
        for way in WAYS
    ]


def product(size: int) -> Callable[[], None]:
    left, right = (torch.randn(size, size).bfloat16() for _ in range(2))
    out = torch.empty(size, size, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(N_PRODUCTS):
            torch.mm(left, right, out=out)

    return run
