"""The chunked loss against the loss of whole logits: the same sum and gradients, in less memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.assertions import assert_same_grads, relative_error
from turnout.data.loader import IGNORE_INDEX
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.training import linear_cross_entropy as module
from turnout.training.linear_cross_entropy import linear_cross_entropy

T, D, V = 37, 16, 53


def leaves(dtype: torch.dtype, vocab_size: int = V) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {"hidden": torch.randn(T, D, generator=generator, dtype=torch.float64)}
    made["weight"] = torch.randn(vocab_size, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (T,), generator=generator)
    targets[::4] = IGNORE_INDEX
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}, targets


def by_logits(tensors: dict[str, Tensor], targets: Tensor) -> Tensor:
    logits = tensors["hidden"] @ tensors["weight"].T
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked(tensors: dict[str, Tensor], targets: Tensor, *, compiles: bool = False) -> Tensor:
    return linear_cross_entropy(tensors["hidden"], tensors["weight"], targets, Unsplit(), compiles=compiles)


@pytest.mark.parametrize("n_at_once", [1, 5, T, 1000])
def test_loss_and_gradients_are_those_of_logits(n_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_loss(n_at_once, monkeypatch, compiles=False)


def check_loss(n_at_once: int, monkeypatch: pytest.MonkeyPatch, *, compiles: bool) -> None:
    """Compare loss and gradients, in chunks of n_at_once tokens, with those of whole logits."""
    monkeypatch.setattr(module, "CHUNK_BYTES", n_at_once * V * 8)
    results = []
    for loss in (by_logits, partial(chunked, compiles=compiles)):
        tensors, targets = leaves(torch.float64)
        total = loss(tensors, targets)
        (total / 7).backward()
        results.append((total, {name: tensor.grad for name, tensor in tensors.items()}))
    (want, want_grads), (got, got_grads) = results
    assert relative_error(got, want) < 1e-14
    assert_same_grads(got_grads, want_grads, rtol=1e-13)


def test_the_loss_of_ignored_targets_is_zero() -> None:
    tensors, targets = leaves(torch.float32)
    total = chunked(tensors, torch.full_like(targets, IGNORE_INDEX))
    total.backward()
    assert total == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors.values())


def test_large_logits_do_not_overflow() -> None:
    tensors, targets = leaves(torch.float32)
    loud = {name: (100 * tensor).detach().requires_grad_() for name, tensor in tensors.items()}
    total = chunked(loud, targets)
    total.backward()
    assert relative_error(total, by_logits(loud, targets)) < 1e-6
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in loud.values())


def test_half_precision_is_summed_in_fp32() -> None:
    """Measured against fp64 on the same rounded inputs: 1.2e-4, and 1.6e-2 for gradients, as with logits."""
    half, targets = leaves(torch.bfloat16, vocab_size=5000)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in half.items()}
    got, want = chunked(half, targets), by_logits(exact, targets)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 3e-4
    got.backward()
    want.backward()
    grads = [{name: tensor.grad for name, tensor in tensors.items()} for tensors in (half, exact)]
    assert_same_grads(*grads, rtol=2e-2)


def test_gradients_of_the_head_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand equal tokens, one per chunk: a sum in bf16 would stop growing at 256 of them."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    few, targets = leaves(torch.bfloat16)
    half = {name: tensor.detach().clone() for name, tensor in few.items()}
    half["hidden"] = half["hidden"][1:2].repeat(1000, 1)
    exact = {name: tensor.double().requires_grad_() for name, tensor in half.items()}
    half = {name: tensor.requires_grad_() for name, tensor in half.items()}
    for loss, tensors in ((chunked, half), (by_logits, exact)):
        loss(tensors, targets[1:2].repeat(1000)).backward()
    grads = [{name: tensor.grad for name, tensor in tensors.items()} for tensors in (half, exact)]
    assert_same_grads(*grads, rtol=2e-2)


def test_half_precision_is_scored_in_fp32_without_gradients_too() -> None:
    half, targets = leaves(torch.bfloat16, vocab_size=5000)
    exact = {name: tensor.detach().double() for name, tensor in half.items()}
    with torch.no_grad():
        got = chunked(half, targets)
    assert got.dtype == torch.float32
    assert relative_error(got, by_logits(exact, targets)) < 3e-4


def test_without_gradients_nothing_is_kept() -> None:
    tensors, targets = leaves(torch.float32)
    with torch.no_grad():
        total = chunked(tensors, targets)
    assert not total.requires_grad
    assert relative_error(total, by_logits(tensors, targets)) < 1e-6


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensors created are those of one chunk, and the gradient of the head."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 5 * 4096)
    tensors, targets = leaves(torch.float32, vocab_size=4096)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            made = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, Tensor))
            return made

    with Sizes():
        chunked(tensors, targets).backward()
    allowed = {5 * 4096, (T % 5) * 4096, 4096 * D}
    assert max(sizes) == 4096 * D
    assert {size for size in sizes if size > T * D} <= allowed
