"""The comparisons that other tests rely on find the differences that they should find."""

import pytest
import torch
from torch import Tensor

from tests.assertions import assert_same_grads, assert_same_tensors

WANT = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.1], ids=str)
def test_one_wrong_element_is_found_wherever_it_is(name: str, value: float) -> None:
    got = {key: tensor.clone() for key, tensor in WANT.items()}
    assert_same_tensors(got, WANT, rtol=1e-6)
    got[name][1] = value
    with pytest.raises(AssertionError, match=f"{name}: relative error"):
        assert_same_tensors(got, WANT, rtol=1e-6)


def test_a_missing_name_is_found() -> None:
    with pytest.raises(AssertionError, match="sets differ: \\['b'\\]"):
        assert_same_tensors({"a": WANT["a"]}, WANT, rtol=1.0)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ({"a": None}, {"a": WANT["a"]}, "no gradient reached"),
        ({"a": WANT["a"]}, {"a": torch.zeros(2)}, "all zero"),
        ({"a": WANT["a"]}, {"b": WANT["a"]}, "parameter sets differ"),
    ],
    ids=["no gradient", "a gradient of zero proves nothing", "another parameter"],
)
def test_gradients_that_prove_nothing_are_refused(
    got: dict[str, Tensor | None], want: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_grads(got, want, rtol=1e-6)
