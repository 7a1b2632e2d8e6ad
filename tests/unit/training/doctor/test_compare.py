"""Which differences the comparison of two trainings reports, and how it describes them."""

import math

import pytest
import torch
from torch import Tensor

from turnout.training.doctor.compare import CHECKS, LIMITS, compare_check

EXPERTS = "decoder.blocks.0.moe.experts.gate_up"


def gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"decoder.embed.weight": (7, 6), EXPERTS: (4, 3, 6), "decoder.norm.weight": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_rounding_agrees_and_the_worst_tensor_is_named() -> None:
    want = gradients()
    got = {name: tensor * (1 + 1e-7) for name, tensor in want.items()}
    got["decoder.norm.weight"] = want["decoder.norm.weight"] * (1 + 1e-6)
    found = compare_check("gradient", got, want)
    assert found.agrees and found.first is None and found.n_tensors == 3
    assert found.worst is not None and found.worst.name == "norm.weight"
    assert found.worst.error == pytest.approx(1e-6, rel=0.2)


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_wrong_factor_is_named_with_its_size(factor: float, is_half: bool) -> None:
    want = gradients()
    found = compare_check("gradient", want | {EXPERTS: factor * want[EXPERTS]}, want, is_half=is_half)
    assert found.n_different == 1 and found.first == found.worst and found.first is not None
    assert found.first.name == "blocks.0.moe.experts.gate_up"
    assert found.first.detail == f"is {factor:.4g} times that of one process"


def test_first_is_the_tensor_nearest_to_the_loss() -> None:
    want = gradients()
    got = {name: 2 * tensor for name, tensor in want.items()}
    got["decoder.embed.weight"] *= 5
    found = compare_check("gradient", got, want)
    assert found.n_different == 3 and found.first is not None and found.worst is not None
    assert (found.first.name, found.worst.name) == ("norm.weight", "embed.weight")


def test_experts_that_differ_are_named() -> None:
    want = gradients()
    got = want | {EXPERTS: want[EXPERTS].clone()}
    got[EXPERTS][2] += 0.1
    first = compare_check("gradient", got, want).first
    assert first is not None and first.detail.endswith("of its norm, in experts [2]")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_tensor_differs(bad: float) -> None:
    want = gradients()
    got = want | {EXPERTS: torch.full_like(want[EXPERTS], bad)}
    for is_half in (False, True):
        found = compare_check("gradient", got, want, is_half=is_half)
        assert found.n_different == 1 and found.worst is not None
        assert found.worst.name == "blocks.0.moe.experts.gate_up"


def test_missing_and_surplus_names_differ() -> None:
    want = gradients()
    fewer = {name: tensor for name, tensor in want.items() if name != EXPERTS}
    for got, detail in ((fewer, "is missing"), (want | {"x": torch.ones(2)}, "is not in one process")):
        first = compare_check("gradient", got, want).first
        assert first is not None and first.detail == detail


def test_there_is_nothing_to_compare_if_all_is_zero() -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in gradients().items()}
    assert compare_check("balancing gradient", zeros, zeros).worst is None
    assert not compare_check("balancing gradient", gradients(), zeros).agrees


def test_ids_must_be_the_same() -> None:
    want = {"samples of step 0": torch.arange(8)}
    rows = torch.arange(8).repeat(2, 1)
    assert compare_check("sample ids", {"samples of step 0": rows}, want).agrees
    rows[1, 3] = 0
    first = compare_check("sample ids", {"samples of step 0": rows}, want).first
    assert first is not None and first.detail == "6% of the elements differ, the first at [1, 3]"


def test_noise_across_a_tensor_is_no_difference_in_half_precision() -> None:
    want = {"x": torch.tensor([1.0, 0.0, 0.0])}
    noisy = {"x": torch.tensor([1.0, 0.4, 0.0])}
    assert compare_check("gradient", noisy, want, is_half=True).agrees
    assert not compare_check("gradient", noisy, want).agrees


def test_every_check_has_a_limit() -> None:
    assert set(CHECKS) == set(LIMITS)
