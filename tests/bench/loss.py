"""The loss computed without all logits against the loss from logits: `python -m tests.bench loss`.

T tokens and a vocabulary of V in bf16, forward and backward, one thread.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.rows import Row
from tests.bench.side_by_side import (
    GLIBC_DEFAULTS,
    MIB,
    in_ms,
    in_own_process,
    over,
    peak_extra_bytes,
    time_in_turn,
)
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.training.linear_cross_entropy import linear_cross_entropy

T, D, V = 4096, 512, 50_304


def loss_rows(n_rounds: int = 7) -> list[Row]:
    torch.set_num_threads(1)
    tensors, targets = synthetic()
    hidden, weight = (tensor.detach().float() for tensor in tensors)
    exact = float(F.cross_entropy(hidden @ weight.T, targets))
    losses: dict[str, float] = {}
    seconds = time_in_turn({way: build(way, tensors, targets, losses) for way in WAYS}, n_rounds=n_rounds)
    peaks = {way: in_own_process(peak_bytes, way, malloc=GLIBC_DEFAULTS) for way in WAYS}
    base, *others = WAYS
    rows = []
    for way in others:
        most_time, most_memory, most_error = (1.0, 0.25, 1e-4) if way == OURS else (None, None, None)
        times, memory = over(seconds[way], seconds[base]), peaks[way] / peaks[base]
        note = f"{in_ms(seconds[way])} and {in_ms(seconds[base])}"
        rows.append(Row.of(f"time of {way} over {base}", times, at_most=most_time, note=note))
        note = f"{peaks[way] / MIB:,.0f} and {peaks[base] / MIB:,.0f} MiB"
        rows.append(Row.of(f"memory of {way} over {base}", [memory], at_most=most_memory, note=note))
        note = f"{losses[way]:.6f} and {exact:.6f}"
        error = abs(losses[way] / exact - 1)
        rows.append(Row.of(f"error of {way} over the loss in fp32", [error], at_most=most_error, note=note))
    return rows


def peak_bytes(way: str) -> int:
    """Return the bytes that a way takes. To be called in a new process, which holds no freed memory."""
    torch.set_num_threads(1)
    return peak_extra_bytes(build(way, *synthetic()))


def synthetic() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    values = (torch.randn(T, D), torch.randn(V, D) / D**0.5)
    return [value.bfloat16().requires_grad_() for value in values], torch.randint(V, (T,))


def by_fp32_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def by_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, Unsplit()) / T


def by_fused_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, Unsplit(), compiles=True) / T


OURS = "chunks, no logits"
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits.float() and cross-entropy": by_fp32_logits,
    "bf16 logits and cross-entropy": by_logits,
    OURS: by_chunks,
    "chunks, compiled": by_fused_chunks,
}


def build(
    name: str, tensors: list[Tensor], targets: Tensor, losses: dict[str, float] | None = None
) -> Callable[[], None]:
    def run() -> None:
        for tensor in tensors:
            tensor.grad = None
        total = WAYS[name](*tensors, targets)
        total.backward()
        if losses is not None:
            losses[name] = float(total.detach())

    return run
