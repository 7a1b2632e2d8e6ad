"""Comparisons of tensors by name, in which nothing may be missing."""

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference relative to the largest wanted magnitude."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-300))


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor], *, rtol: float) -> None:
    assert got.keys() == want.keys(), f"sets differ: {sorted(got.keys() ^ want.keys())}"
    errors = {name: relative_error(got[name], want[name]) for name in want}
    # Not only the largest: max() would miss a NaN.
    wrong = [
        f"{name}: relative error {error:.1e} > {rtol:.0e}"
        for name, error in errors.items()
        if not error <= rtol
    ]
    assert not wrong, "; ".join(wrong)


def assert_same_grads(got: dict[str, Tensor | None], want: dict[str, Tensor | None], *, rtol: float) -> None:
    """Compare gradients. Missing ones and all-zero references fail, because they would prove nothing."""
    assert got.keys() == want.keys(), f"parameter sets differ: {sorted(got.keys() ^ want.keys())}"
    missing = sorted(k for k in want if got[k] is None or want[k] is None)
    assert not missing, f"no gradient reached {missing}"
    dead = sorted(k for k, g in want.items() if g is not None and not g.any())
    assert not dead, f"reference gradient is all zero, so this proves nothing: {dead}"
    assert_same_tensors(
        {k: g for k, g in got.items() if g is not None},
        {k: g for k, g in want.items() if g is not None},
        rtol=rtol,
    )
