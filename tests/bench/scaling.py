"""What a token costs among more experts, and a row among more rows: `python -m tests.bench scaling`.

One thread. Each expert has ROWS_PER_EXPERT rows, so that more experts are more tokens, and not less work for
each.
"""

import torch

from tests.bench.experts import (
    DTYPES,
    D,
    build_layer,
    layer_config,
    layer_step,
    leaf,
    made_up_routing,
    mix_step,
)
from tests.bench.rows import Row
from tests.bench.side_by_side import (
    GLIBC_DEFAULTS,
    in_own_process,
    over,
    peak_extra_bytes,
    time_in_turn,
)

N_EXPERTS = (8, 16, 32, 64, 128)
ROWS_PER_EXPERT, TOP_K, D_EXPERT = 512, 2, 512
# Of the memory: one number of experts, so that their gradients, which have no rows, are the same.
N_MEMORY_EXPERTS, MEMORY_TOKENS = 16, (8_192, 16_384, 32_768, 65_536)


def scaling_rows(n_rounds: int = 5) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        for has_router in (True, False):
            rows += token_rows(dtype, "compiled_loop", N_EXPERTS, has_router=has_router, n_rounds=n_rounds)
    return [*rows, *memory_rows()]


def token_rows(
    dtype: str,
    backend: str,
    n_experts: tuple[int, ...],
    *,
    has_router: bool,
    n_rounds: int,
    rows_per_expert: int = ROWS_PER_EXPERT,
) -> list[Row]:
    """Return the time of a token by the number of experts, over that among the fewest."""
    n_tokens = {n: n * rows_per_expert // TOP_K for n in n_experts}
    ways = {}
    for n in n_experts:
        cfg = layer_config(n, TOP_K, D_EXPERT, n_tokens[n])
        layer, shape = build_layer(cfg, backend, DTYPES[dtype]), (n_tokens[n], D)
        x, out = leaf(*shape, dtype=DTYPES[dtype]), torch.randn(shape).to(DTYPES[dtype])
        if has_router:
            ways[n] = layer_step(layer, cfg, x, out)
        else:
            ways[n] = mix_step(layer, made_up_routing(n_tokens[n], n, TOP_K, 0.0), x, out)
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


def memory_rows() -> list[Row]:
    """Return what each doubling of the rows adds per row, over what the first adds."""
    peaks = [in_own_process(peak_bytes, n, malloc=GLIBC_DEFAULTS) for n in MEMORY_TOKENS]
    n_rows = [TOP_K * n for n in MEMORY_TOKENS]
    pairs = list(zip(zip(n_rows, peaks, strict=True), zip(n_rows[1:], peaks[1:], strict=False), strict=False))
    added = [(more - fewer) / (m - n) for (n, fewer), (m, more) in pairs]
    return [
        Row.of(
            f"memory that a row adds, bf16, {m:,} rows over {n_rows[1]:,}",
            [bytes_per_row / added[0]],
            at_most=1.05,
            note=f"{bytes_per_row:,.0f} bytes",
        )
        for m, bytes_per_row in zip(n_rows[2:], added[1:], strict=True)
    ]


def peak_bytes(n_tokens: int) -> int:
    """Return the bytes that dispatch, experts and combine take, forwards and backwards."""
    torch.set_num_threads(1)
    dtype = DTYPES["bf16"]
    layer = build_layer(layer_config(N_MEMORY_EXPERTS, TOP_K, D_EXPERT, n_tokens), "compiled_loop", dtype)

    def forward_and_backward(n_tokens: int) -> None:
        routing = made_up_routing(n_tokens, N_MEMORY_EXPERTS, TOP_K, 0.0)
        mix_step(layer, routing, leaf(n_tokens, D, dtype=dtype), torch.randn(n_tokens, D).to(dtype))()

    forward_and_backward(64)  # compiles
    x, out = leaf(n_tokens, D, dtype=dtype), torch.randn(n_tokens, D).to(dtype)
    run = mix_step(layer, made_up_routing(n_tokens, N_MEMORY_EXPERTS, TOP_K, 0.0), x, out)
    return peak_extra_bytes(run)
