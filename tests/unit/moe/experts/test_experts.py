"""Every expert backend against the reference loop: ragged, empty and unique experts."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch._dynamo.utils import counters

from tests.assertions import assert_same_grads, relative_error
from tests.models import tiny_config
from turnout.moe.experts import sorted_loop
from turnout.moe.experts.experts import (
    EXPERT_BACKENDS,
    ApplyExperts,
    Experts,
    backend_of,
    choose_backend,
    reference_experts,
)
from turnout.moe.experts.requirements import REQUIREMENTS
from turnout.moe.experts.sorted_loop import sorted_loop_experts
from turnout.moe.parallel.expert_parallel import LocalDispatcher

# These have tests/megablocks, which `make test-megablocks` runs.
ON_GPUS_ONLY = {name for name, needs in REQUIREMENTS.items() if needs.is_gpu_only}
# These start a compiler process: tests/processes/test_compile.py.
COMPILED = {"compiled_loop"}
R = TypeVar("R")
L, D, F = 5, 16, 24
COUNTS = {
    "ragged, one empty": [7, 0, 13, 1, 16],
    "all to one": [0, 0, 37, 0, 0],
    "first and last empty": [0, 12, 12, 13, 0],
    "no rows at all": [0, 0, 0, 0, 0],
}
# Measured: 2e-8 in fp32, and 1.1e-2 in bf16, where activations are rounded once, not after each operation.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def leaves(counts: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n_rows = sum(counts)
    shapes = {
        "rows": (n_rows, D),
        "weights": (n_rows,),
        "gate_up": (L, D, 2 * F),
        "down": (L, D, F),
    }
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    # Routing weights are fp32 or wider; some are 0, as underflow makes them.
    made["weights"] = made["weights"].to(torch.promote_types(dtype, torch.float32))
    made["weights"][::5] = 0
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def apply(backend: ApplyExperts, counts: list[int], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    rows, weights, *matrices = tensors.values()
    return backend(rows, weights, torch.tensor(counts), *matrices)


def run(
    backend: ApplyExperts, counts: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return the results, and the gradients of a sum in which each element has its own weight."""
    tensors = leaves(counts, dtype)
    out = apply(backend, counts, tensors)
    mix = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(dtype)
    (out * mix).sum().backward()
    return out, {name: tensor.grad for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("name", sorted(EXPERT_BACKENDS.keys() - {"reference"} - ON_GPUS_ONLY - COMPILED))
def test_backend_equals_the_loop(name: str, counts: list[int], dtype: torch.dtype) -> None:
    check_backend(name, counts, dtype)


def check_backend(name: str, counts: list[int], dtype: torch.dtype) -> None:
    """Compare a backend's results and gradients with those of the reference loop."""
    got, got_grads = run(EXPERT_BACKENDS[name].apply, counts, dtype)
    want, want_grads = run(reference_experts, counts, dtype)
    assert got.shape == want.shape == (sum(counts), D)
    if not sum(counts):
        for grads in (got_grads, want_grads):
            assert all(g is not None and not g.any() for g in grads.values()), "zero rows, zero gradients"
        return
    assert relative_error(got, want) <= RTOL[dtype]
    assert_same_grads(got_grads, want_grads, rtol=RTOL[dtype])
    idle = [e for e, n in enumerate(counts) if n == 0]
    assert not got_grads["gate_up"][idle].any()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_loop_is_the_same_without_gradients(counts: list[int]) -> None:
    tensors = leaves(counts, torch.float32)
    for backend in (reference_experts, sorted_loop_experts):
        with torch.no_grad():
            out = apply(backend, counts, tensors)
        assert torch.equal(out, apply(backend, counts, tensors))


@pytest.mark.parametrize("backend", [reference_experts, sorted_loop_experts])
def test_backends_of_any_dtype_pass_gradcheck(backend: ApplyExperts) -> None:
    check_gradients(backend)


def check_gradients(backend: ApplyExperts) -> None:
    counts = [3, 0, 1, 2, 0]
    tensors = leaves(counts, torch.float64)

    def run(*args: torch.Tensor) -> torch.Tensor:
        return apply(backend, counts, dict(zip(tensors, args, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


def test_blocks_hold_many_experts_or_a_part_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [7, 0, 13, 1, 16]
    results = []
    for n_rows in (4096, 5, 10):
        monkeypatch.setattr(sorted_loop, "ROWS_AT_ONCE", n_rows)
        results.append(run(sorted_loop_experts, counts, torch.float64))
    want, want_grads = results[0]
    for got, got_grads in results[1:]:
        assert relative_error(got, want) < 1e-12
        assert_same_grads(got_grads, want_grads, rtol=1e-12)


def sizes_of_products(call: Callable[[], R]) -> tuple[R, set[int]]:
    """Return what a function returns, and all sizes of the matrices that it multiplies."""
    with torch.profiler.profile(record_shapes=True) as seen:
        result = call()
    products = [event for event in seen.events() if event.name in ("aten::mm", "aten::addmm_")]
    shapes = (shape for event in products for shape in event.input_shapes if len(shape) == 2)
    return result, {n for shape in shapes for n in shape}


@pytest.mark.parametrize("rows_at_once", [4096, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_half_precision_have_few_sizes(
    dtype: torch.dtype, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_loop, "ROWS_AT_ONCE", rows_at_once)
    for counts in ([40, 0, 71, 130, 9], [1, 1, 1, 247, 0], [0, 0, 3, 0, 33], [250, 0, 0, 0, 0]):
        (got, got_grads), sizes = sizes_of_products(partial(run, sorted_loop_experts, counts, dtype))
        want, want_grads = run(reference_experts, counts, dtype)
        assert relative_error(got, want) <= RTOL[dtype]
        assert_same_grads(got_grads, want_grads, rtol=RTOL[dtype])
        assert {D, F, 2 * F} <= sizes and all(n == F or n % sorted_loop.TILE_ROWS == 0 for n in sizes)


def test_rows_that_overflow_in_fp16_leave_other_experts_gradients_alone() -> None:
    """The rows of expert 0 are rounded up into those of expert 2, whose products are all infinite."""
    counts, results = [7, 0, 13, 1, 16], []
    for loudness in (1.0, 2e4):
        tensors = leaves(counts, torch.float16)
        tensors["rows"].data[7:20] *= loudness
        out = apply(sorted_loop_experts, counts, tensors)
        out.sum().backward()
        results.append({name: tensors[name].grad[0] for name in ("gate_up", "down")})
    assert not out[7:20].isfinite().all(), "nothing overflowed, so this proves nothing"
    for name, want in results[0].items():
        assert relative_error(results[1][name], want) < 1e-6, name


def test_nothing_is_left_uninitialised() -> None:
    """If torch is set to be deterministic, it fills new memory with NaN."""
    counts = [7, 0, 13, 1, 0]
    want, want_grads = run(sorted_loop_experts, counts, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        got, got_grads = run(sorted_loop_experts, counts, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, want)
    assert [name for name, grad in want_grads.items() if not torch.equal(got_grads[name], grad)] == []
    assert not got_grads["gate_up"][[1, 4]].any() and not got_grads["down"][[1, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_the_checks_of_torch(dtype: torch.dtype) -> None:
    """Shapes of fake tensors, no aliases, and the autograd registration."""
    rows, weights, *matrices = (
        t.detach().requires_grad_() for t in leaves([7, 0, 13, 1, 16], dtype).values()
    )
    arguments = (rows, weights, torch.tensor([7, 0, 13, 1, 16]), *matrices, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.turnout.sorted_loop, arguments, test_utils=checks)


def test_another_routing_is_the_same_graph() -> None:
    counters.clear()
    compiled = torch.compile(sorted_loop_experts, fullgraph=True, backend="aot_eager")
    for counts in COUNTS.values():
        if not sum(counts):
            continue
        tensors = leaves(counts, torch.float32)
        out = apply(compiled, counts, tensors)
        out.sum().backward()
        assert torch.equal(out, apply(sorted_loop_experts, counts, tensors))
        assert all(tensor.grad is not None for tensor in tensors.values())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("capability", "in_half", "in_half_without_triton"),
    [
        (None, "sorted_loop", "sorted_loop"),
        ((7, 5), "sorted_loop", "sorted_loop"),
        ((8, 0), "triton_grouped", "sorted_loop"),
        ((8, 6), "triton_grouped", "sorted_loop"),
        ((8, 9), "triton_grouped", "sorted_loop"),
        ((9, 0), "torch_grouped", "torch_grouped"),
        ((10, 0), "torch_grouped", "torch_grouped"),
    ],
    ids=str,
)
def test_the_backend_follows_the_gpu(
    capability: tuple[int, int] | None, in_half: str, in_half_without_triton: str
) -> None:
    cfg = tiny_config()
    for dtype in (torch.bfloat16, torch.float16):
        assert backend_of(cfg, capability, dtype, has_triton=True) == in_half
        assert backend_of(cfg, capability, dtype, has_triton=False) == in_half_without_triton
        assert backend_of(tiny_config(d_expert=9), capability, dtype, has_triton=True) == "sorted_loop"
    assert backend_of(cfg, capability, torch.float32, has_triton=True) == "sorted_loop"


def test_a_cpu_loops_over_experts() -> None:
    assert choose_backend(tiny_config(), torch.device("cpu"), torch.bfloat16) == "sorted_loop"


def test_unknown_backend_and_misaligned_widths_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="use one of"):
        Experts(tiny_config(), 6, "fastest")
    with pytest.raises(ValueError, match="d_expert=9 must be multiples of 8"):
        Experts(tiny_config(d_expert=9), 6, "torch_grouped")


def test_gpu_kernels_are_refused_on_a_cpu() -> None:
    order = torch.arange(4)
    for move in (EXPERT_BACKENDS["megablocks"].copy_rows, EXPERT_BACKENDS["megablocks"].sum_rows):
        with pytest.raises(ValueError, match="Triton kernels, which need a GPU, but these rows are on cpu"):
            move(torch.randn(4, D), order, order, 1)


def test_local_dispatch_is_the_identity() -> None:
    rows = torch.randn(11, D, requires_grad=True)
    counts = torch.tensor([4, 0, 7])
    dispatcher = LocalDispatcher()
    route = dispatcher.plan(counts, 11, is_dropless=True)
    (chunk,) = route.chunks
    back = dispatcher.combine(dispatcher.dispatch(rows, chunk)(), chunk)()
    assert torch.equal(back, rows) and torch.equal(chunk.counts_L, counts)
    back.backward(gradient := torch.randn(11, D))
    assert torch.equal(rows.grad, gradient)
