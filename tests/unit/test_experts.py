"""Every expert backend against the reference loop: ragged, empty and unique experts."""

import pytest
import torch

from moe.dispatch import LocalDispatcher
from moe.experts import EXPERT_BACKENDS, Experts, reference_experts
from tests.assertions import assert_same_grads, relative_error
from tests.models import tiny_config

L, D, F = 5, 16, 24
COUNTS = {
    "ragged, one empty": [7, 0, 13, 1, 16],
    "all to one": [0, 0, 37, 0, 0],
    "first and last empty": [0, 12, 12, 13, 0],
    "no rows at all": [0, 0, 0, 0, 0],
}
# Measured: grouped against the loop differs by 0 in fp32 and by one rounding of the product in bf16 and fp16.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def leaves(counts: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (sum(counts), D), "gate": (L, F, D), "up": (L, F, D), "down": (L, D, F)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("name", sorted(EXPERT_BACKENDS.keys() - {"reference"}))
def test_backend_equals_the_loop(name: str, counts: list[int], dtype: torch.dtype) -> None:
    results = []
    for backend in (EXPERT_BACKENDS[name], reference_experts):
        tensors = leaves(counts, dtype)
        out = backend(tensors["rows"], torch.tensor(counts), tensors["gate"], tensors["up"], tensors["down"])
        mix = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        (out * mix).sum().backward()
        results.append((out, {k: t.grad for k, t in tensors.items()}))
    (got, got_grads), (want, want_grads) = results
    assert got.shape == want.shape == (sum(counts), D)
    if not sum(counts):
        for grads in (got_grads, want_grads):
            assert all(g is not None and not g.any() for g in grads.values()), "zero rows, zero gradients"
        return
    assert relative_error(got, want) <= RTOL[dtype]
    assert_same_grads(got_grads, want_grads, rtol=RTOL[dtype])
    idle = [e for e, n in enumerate(counts) if n == 0]
    assert not got_grads["gate"][idle].any()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_loop_is_the_same_where_no_gradient_can_follow(counts: list[int]) -> None:
    tensors = leaves(counts, torch.float32)
    arguments = (tensors["rows"], torch.tensor(counts), tensors["gate"], tensors["up"], tensors["down"])
    with torch.no_grad():
        out = reference_experts(*arguments)
    assert torch.equal(out, reference_experts(*arguments))


def test_reference_experts_pass_gradcheck() -> None:
    tensors = {
        k: t.detach().double().requires_grad_() for k, t in leaves([3, 0, 1, 2, 0], torch.float32).items()
    }

    def apply(*args: torch.Tensor) -> torch.Tensor:
        return reference_experts(args[0], torch.tensor([3, 0, 1, 2, 0]), *args[1:])

    assert torch.autograd.gradcheck(apply, tuple(tensors.values()))


def test_unknown_backend_and_misaligned_widths_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="use one of"):
        Experts(tiny_config(), 6, "fastest")
    with pytest.raises(ValueError, match="d_expert=9 must be multiples of 8"):
        Experts(tiny_config(d_expert=9), 6, "grouped")


def test_local_dispatch_is_the_identity() -> None:
    rows = torch.randn(11, D, requires_grad=True)
    counts = torch.tensor([4, 0, 7])
    dispatcher = LocalDispatcher()
    route = dispatcher.plan(counts, 11, is_dropless=True)
    back = dispatcher.combine(dispatcher.dispatch(rows, route), route)
    assert torch.equal(back, rows) and torch.equal(route.counts_L, counts)
    back.backward(gradient := torch.randn(11, D))
    assert torch.equal(rows.grad, gradient)
