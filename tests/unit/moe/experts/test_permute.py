"""Row permutations: equal to indexing, forward and backward."""

import torch

from turnout.moe.experts.permute import copy_rows, invert, permute_rows

ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


def test_invert_undoes() -> None:
    assert ORDER[invert(ORDER)].tolist() == list(range(6))


def test_permute_rows_equals_indexing_with_its_gradient() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permute_rows(rows, ORDER, invert(ORDER)), rows[ORDER])
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, ORDER, invert(ORDER)), (rows,))


def test_copy_rows_equals_indexing_with_its_gradient() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(copy_rows(x, ORDER, invert(ORDER), 2), x[ORDER // 2])
    assert torch.autograd.gradcheck(lambda t: copy_rows(t, ORDER, invert(ORDER), 2), (x,))
