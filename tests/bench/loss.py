"""The loss without logits against the loss of logits: `python -m tests.bench loss`. One thread."""

import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.tensor_parallel import Unsplit
from tests.bench.side_by_side import MIB, peak_extra_bytes, time_in_turn, without_allocator
from training.linear_cross_entropy import linear_cross_entropy

T, D, V = 4096, 512, 50_304


def print_loss_cost() -> None:
    torch.set_num_threads(1)
    tensors, targets = made_up()
    hidden, weight = (tensor.detach().float() for tensor in tensors)
    exact = float(F.cross_entropy(hidden @ weight.T, targets))
    print(f"\n### loss of {T} tokens and {V:,} words, d {D}, bf16, forward and backward\n")
    print(f"| way | ms | ratio | spread | extra MiB | loss, fp32's being {exact:.5f} |")
    print("|---|---|---|---|---|---|")
    losses: dict[str, float] = {}
    timings = time_in_turn({name: build(name, tensors, targets, losses) for name in WAYS}, n_rounds=7)
    for name, found in timings.items():
        print(
            f"| {name} | {found.ms:,.0f} | {found.ratio:.2f} | {found.low:.2f} to {found.high:.2f} "
            f"| {peak_alone(name) / MIB:,.0f} | {losses[name]:.5f} |",
            flush=True,
        )


def peak_alone(name: str) -> int:
    """Return the bytes that a way takes in a process of its own, which holds no freed memory."""
    words = [sys.executable, "-m", "tests.bench.loss", name]
    said = subprocess.run(words, capture_output=True, text=True, timeout=300, env=without_allocator())
    assert said.returncode == 0, said.stderr
    return int(said.stdout.splitlines()[-1])


def made_up() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    values = (torch.randn(T, D), torch.randn(V, D) / D**0.5)
    return [value.bfloat16().requires_grad_() for value in values], torch.randint(V, (T,))


def by_fp32_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def by_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, Unsplit()) / T


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits.float() and cross-entropy": by_fp32_logits,
    "bf16 logits and cross-entropy": by_logits,
    "chunks, no logits": by_chunks,
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


if __name__ == "__main__":
    if len(sys.argv) == 2:
        torch.set_num_threads(1)
        print(peak_extra_bytes(build(sys.argv[1], *made_up())))
    else:
        print_loss_cost()
