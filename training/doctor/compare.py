"""How much two trainings differ, tensor by tensor: the arithmetic of `turnout doctor`. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# In the order in which a fault becomes visible. Those up to "first update" belong to the first update step.
CHECKS = (
    "sample ids",
    "loss",
    "balancing gradient",
    "gradient",
    "clip norm",
    "router state",
    "first update",
    "second step",
    "both updates",
)
# For each of CHECKS: name -> tensor.
Evidence = dict[str, dict[str, Tensor]]

# The largest error in fp32, relative to a tensor's norm: about ten times the errors measured over the
# packaged recipes on 2 and 4 ranks (LOG.md), and far below the error of any wrong factor, group or count.
LIMITS = {
    "sample ids": 0.0,
    "loss": 1e-5,
    "balancing gradient": 2e-5,
    "gradient": 2e-5,
    "clip norm": 1e-5,
    "router state": 1e-6,
    "first update": 5e-4,
    "second step": 1e-5,
    "both updates": 5e-4,
}
# In bf16 rows change experts at near-ties. That makes tensors noisy but neither longer nor shorter, so the
# length along the fp32 tensor is compared, which a lost or doubled contribution changes.
HALF_LIMITS = {
    "sample ids": 0.0,
    "loss": 2e-2,
    "balancing gradient": 0.2,
    "gradient": 0.2,
    "clip norm": 5e-2,
    "router state": 0.2,
    "first update": 0.2,
    "second step": 0.2,
    "both updates": 0.2,
}
# Not compared in bf16: counts that depend on near-ties, and signs of such counts.
NOT_IN_HALF = ("bias", "dropped rows")

# Rounding errors are relative to the summed terms. A tensor much smaller than the others of its check (a
# gradient whose terms cancel) is therefore measured against this fraction of their root mean square.
FLOOR = 1e-3


@dataclass(frozen=True)
class Deviation:
    """How one tensor differs: the norm of the difference relative to the wanted norm, and a description."""

    name: str
    error: float
    detail: str


@dataclass(frozen=True)
class Comparison:
    """The result of one check.

    worst  the tensor with the largest error; None if there is nothing to compare
    first  the first tensor beyond the limit, in the order in which a fault spreads
    """

    check: str
    n_tensors: int
    n_different: int
    worst: Deviation | None
    first: Deviation | None

    @property
    def agrees(self) -> bool:
        """Whether no tensor is beyond its limit."""
        return self.n_different == 0


def compare(got: Evidence, want: Evidence, *, is_half: bool = False) -> list[Comparison]:
    """Compare the evidence of a layout with that of one process in fp32; is_half: the layout ran in bf16."""
    return [compare_check(check, got[check], want[check], is_half=is_half) for check in CHECKS]


def compare_check(
    check: str,
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    limit: float | None = None,
    *,
    is_half: bool = False,
) -> Comparison:
    """Compare named tensors of equal shapes [...]. Missing and surplus names are differences.

    limit: replaces the usual one.
    """
    wrong_names = sorted(got.keys() ^ want.keys())
    if wrong_names:
        whose = "is missing" if wrong_names[0] in want else "is not in one process"
        deviation = Deviation(wrong_names[0], math.inf, whose)
        return Comparison(check, len(want), len(wrong_names), deviation, deviation)
    if not any(tensor.any() for tensor in [*got.values(), *want.values()]):
        return Comparison(check, len(want), 0, None, None)
    if limit is None:
        limit = (HALF_LIMITS if is_half else LIMITS)[check]
    floor = _floor(want) if "gradient" in check or "update" in check else 0.0
    measure = _error_of_length if is_half else _error
    names = [name for name in _spreading_order(check, want) if not (is_half and name in NOT_IN_HALF)]
    errors = {name: measure(got[name], want[name], floor) for name in names}
    different = [name for name, error in errors.items() if not error <= limit]
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])

    def describe(name: str) -> Deviation:
        return _describe(name, errors[name], got[name], want[name], limit)

    first = describe(different[0]) if different else None
    return Comparison(check, len(want), len(different), describe(worst), first)


def _spreading_order(check: str, want: Mapping[str, Tensor]) -> list[str]:
    """Return names in the order in which a fault spreads: gradients flow from the last parameter on."""
    return list(want)[::-1] if "gradient" in check else list(want)


def _floor(want: Mapping[str, Tensor]) -> float:
    """Return FLOOR of the root mean square of all elements."""
    square = sum(float(tensor.double().square().sum()) for tensor in want.values())
    return FLOOR * math.sqrt(square / sum(tensor.numel() for tensor in want.values()))


def _error(got: Tensor, want: Tensor, floor: float) -> float:
    if not want.is_floating_point():
        return float((got != want).double().mean())  # ids: the fraction that differs
    difference = float(torch.linalg.vector_norm(got.double() - want.double()))
    if difference == 0:
        return 0.0
    size = max(float(torch.linalg.vector_norm(want.double())), floor * math.sqrt(want.numel()))
    return difference / size if size else math.inf


def _error_of_length(got: Tensor, want: Tensor, floor: float) -> float:
    """Return by how much `got` is too long or too short along `want`, relatively; ignore noise across it."""
    if not want.is_floating_point() or want.numel() == 1:
        return _error(got, want, floor)
    size = max(float(torch.linalg.vector_norm(want.double())), floor * math.sqrt(want.numel()))
    along = float(((got.double() - want.double()) * want.double()).sum())
    return abs(along) / size**2 if size else _error(got, want, floor)


def _describe(name: str, error: float, got: Tensor, want: Tensor, limit: float) -> Deviation:
    name = name.removeprefix("decoder.")
    if not want.is_floating_point():
        index = [int(i) for i in (got != want).nonzero()[0]] if error else []
        return Deviation(name, error, f"{error:.0%} of the elements differ, the first at {index}")
    if want.numel() == 1:
        return Deviation(name, error, f"is {float(got):.9g}, in one process {float(want):.9g}")
    ratio = float((got.double() * want.double()).sum() / want.double().square().sum())
    rest = float(torch.linalg.vector_norm(got.double() - ratio * want.double()))
    whole = float(torch.linalg.vector_norm(got.double() - want.double()))
    if whole and rest < 0.05 * whole:
        return Deviation(name, error, f"is {ratio:.4g} times that of one process")
    return Deviation(name, error, f"is off by {error:.1e} of its norm{_where(name, got, want, limit)}")


def _where(name: str, got: Tensor, want: Tensor, limit: float) -> str:
    """Name the experts that differ, unless all do."""
    if ".experts." not in name:
        return ""
    allowed = limit * torch.linalg.vector_norm(want.double()) / math.sqrt(want.size(0))
    is_off = (got.double() - want.double()).flatten(1).norm(dim=1) > allowed
    if is_off.all() or not is_off.any():
        return ""
    return f", in experts {is_off.nonzero().flatten().tolist()}"
