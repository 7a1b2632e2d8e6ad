"""DeepSpeed's grouped product as an expert backend, against the reference backend.

In fp32 and fp16, because Triton's interpreter multiplies bf16 matrices wrongly.
"""

import pytest
import torch

from tests.assertions import assert_same_grads, relative_error
from tests.megablocks.interpreted import interpret_deepspeed, skip_elsewhere
from tests.models import decoder_by
from tests.unit.moe.experts.test_experts import COUNTS, apply, leaves, run
from tests.unit.moe.test_model import VARIANTS, run_fast, run_slow
from turnout.moe.experts.experts import EXPERT_BACKENDS, reference_experts, triton_grouped_experts

skip_elsewhere()
# Measured: 1e-7 and 0.
RTOL = {torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def interpreted() -> None:
    interpret_deepspeed()


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_backend_equals_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    got, got_grads = run(triton_grouped_experts, counts, dtype)
    want, want_grads = run(reference_experts, counts, dtype)
    assert got.shape == want.shape and got.dtype == want.dtype
    if not sum(counts):
        assert all(grad is not None and not grad.any() for grad in got_grads.values())
        return
    assert relative_error(got, want) <= RTOL[dtype]
    assert_same_grads(got_grads, want_grads, rtol=RTOL[dtype])
    idle = [expert for expert, n_rows in enumerate(counts) if not n_rows]
    assert not any(got_grads[name][idle].any() for name in ("gate_up", "down"))


def test_widths_that_fill_no_tile_and_more_rows_than_one() -> None:
    """The kernels' first tiles are 32 rows by 128 columns, 32 elements deep."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((150, 136), (150,), (2, 136, 140), (2, 136, 70))
    results = []
    for backend in (triton_grouped_experts, reference_experts):
        generator.manual_seed(4)
        inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        rows, weights, *matrices = inputs
        out = backend(rows, weights, torch.tensor([41, 109]), *matrices)
        out.square().sum().backward()
        results.append((out, {str(shape): leaf.grad for shape, leaf in zip(shapes, inputs, strict=True)}))
    (got, got_grads), (want, want_grads) = results
    assert relative_error(got, want) <= 1e-6
    assert_same_grads(got_grads, want_grads, rtol=1e-6)


def test_decoder_equals_its_slow_twin() -> None:
    cfg = VARIANTS["all at once"]
    decoder = decoder_by("triton_grouped", cfg)
    got, _, got_grads = run_fast(decoder, cfg, 0.05)
    want, want_grads = run_slow(decoder, cfg, 0.05)
    assert relative_error(got, want.hidden) <= 1e-5
    assert_same_grads(got_grads, want_grads, rtol=1e-5)


def test_the_kernels_are_those_of_deepspeed() -> None:
    assert EXPERT_BACKENDS["triton_grouped"].apply is triton_grouped_experts
    counts = [7, 0, 13, 1, 16]
    out = apply(triton_grouped_experts, counts, leaves(counts, torch.float32))
    assert type(out.grad_fn).__name__ == "_GroupGemmFnBackward"


def test_what_the_kernels_would_compute_wrongly_is_refused() -> None:
    def run(dtype: torch.dtype, device: str, n_rows: int, n_experts: int, width: int) -> None:
        def made(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        matrices = made(n_experts, 64, 2 * width), made(n_experts, 64, width)
        counts = torch.zeros(n_experts, dtype=torch.int64, device=device)
        triton_grouped_experts(made(n_rows, 64), made(n_rows), counts, *matrices)

    with pytest.raises(ValueError, match="rows would have 16384 x 131072"):
        run(torch.float16, "meta", 2**14, 1, 2**16)
    with pytest.raises(ValueError, match="weights would have 1024 x 64 x 32768"):
        run(torch.float16, "meta", 3, 1024, 2**14)
