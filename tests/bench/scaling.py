"""The cost of a token among more experts, and of a row among more rows: `python -m tests.bench scaling`.

One thread. Each expert has ROWS_PER_EXPERT rows, so more experts mean more tokens and not less work for each.
"""

from itertools import pairwise, repeat

import torch

from tests.bench.experts import (
    DTYPES,
    D,
    build_layer,
    layer_config,
    layer_step,
    leaf,
    mix_step,
    synthetic_routing,
)
from tests.bench.rows import Row
from tests.bench.side_by_side import GLIBC_DEFAULTS, in_own_process, over, peak_extra_bytes, time_in_turn

N_EXPERTS = (8, 16, 32, 64, 128)
ROWS_PER_EXPERT, TOP_K, D_EXPERT = 512, 2, 512
# The same number of experts, so that the gradients of their weights take the same memory.
N_MEMORY_EXPERTS, MEMORY_TOKENS = 16, (8_192, 16_384, 32_768, 65_536)


def scaling_rows(n_rounds: int = 5) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        for has_router in (True, False):
            rows += token_rows(dtype, "compiled_loop", N_EXPERTS, has_router=has_router, n_rounds=n_rounds)
    return [*rows, memory_row()]


def token_rows(
    dtype: str,
    backend: str,
    n_experts: tuple[int, ...],
    *,
    has_router: bool,
    n_rounds: int,
    rows_per_expert: int = ROWS_PER_EXPERT,
) -> list[Row]:
    """Return the time of a token by the number of experts, over that with the fewest."""
    n_tokens = {n: n * rows_per_expert // TOP_K for n in n_experts}
    ways = {}
    for n in n_experts:
        cfg = layer_config(n, TOP_K, D_EXPERT, n_tokens[n])
        layer, shape = build_layer(cfg, backend, DTYPES[dtype]), (n_tokens[n], D)
        x, out = leaf(*shape, dtype=DTYPES[dtype]), torch.randn(shape).to(DTYPES[dtype])
        if has_router:
            ways[n] = layer_step(layer, cfg, x, out)
        else:
            ways[n] = mix_step(layer, repeat(synthetic_routing(n_tokens[n], n, TOP_K, 0.0)), x, out)
    seconds = time_in_turn({str(n): way for n, way in ways.items()}, n_rounds=n_rounds)
    per_token = {n: [s / n_tokens[n] for s in seconds[str(n)]] for n in n_experts}
    fewest = n_experts[0]
    what = "layer" if has_router else "layer without its router"
    return [
        Row.of(
            f"time of a token, {what}, {dtype}, E {n} over E {fewest}",
            over(per_token[n], per_token[fewest]),
            at_most=1.15 if has_router else None,
            note=f"{1e6 * sorted(per_token[n])[n_rounds // 2]:.1f} us",
        )
        for n in n_experts[1:]
    ]


def memory_row() -> Row:
    """Return the bytes that each doubling of the rows adds per row, the most over the least."""
    peaks = [in_own_process(peak_bytes, n, malloc=GLIBC_DEFAULTS) for n in MEMORY_TOKENS]
    n_rows = [TOP_K * n for n in MEMORY_TOKENS]
    added = over([b - a for a, b in pairwise(peaks)], [b - a for a, b in pairwise(n_rows)])
    return Row.of(
        f"bytes that a row adds, bf16, among {n_rows[0]:,} to {n_rows[-1]:,}, most over least",
        [max(added) / min(added)],
        at_most=1.05,
        note=", ".join(f"{n_bytes:,.0f}" for n_bytes in added),
    )


def peak_bytes(n_tokens: int) -> int:
    """Return the bytes that dispatch, experts and combine take, forward and backward."""
    torch.set_num_threads(1)
    dtype = DTYPES["bf16"]
    layer = build_layer(layer_config(N_MEMORY_EXPERTS, TOP_K, D_EXPERT, n_tokens), "compiled_loop", dtype)
    routing = synthetic_routing(n_tokens, N_MEMORY_EXPERTS, TOP_K, 0.0)
    x, out = leaf(n_tokens, D, dtype=dtype), torch.randn(n_tokens, D).to(dtype)
    run = mix_step(layer, repeat(routing), x, out)
    # The first run compiles, and oneDNN makes its kernels and buffers, which do not depend on the rows.
    run()
    for tensor in (x, routing.weights_TK, *layer.parameters()):
        tensor.grad = None
    return peak_extra_bytes(run)
