"""Dispatch and combine over real ranks: identity experts return rows unchanged, and gradients too, in any
number of chunks.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.layouts import groups_of
from tests.ranks import run_ranks
from turnout.moe.experts.permute import invert, permute_rows
from turnout.training.parallel.layout import Layout

N_EXPERTS, D = 8, 3
WAYS: dict[str, dict[str, Any]] = {
    "one chunk": {},
    "three chunks": {"min_chunks": 3},
    "as many as a small limit asks": {"max_load": 0.6},
    "two chunks, and more for a limit": {"max_load": 0.9, "min_chunks": 2},
    "a limit of less than a row": {"max_load": 0.01},
}
LAYOUTS = [Layout(1), Layout(2, ep=2), Layout(4, ep=4), Layout(4, tp=2, ep=2)]


def counts_of(rank: int, case: str) -> Tensor:
    """Return this rank's rows of each expert, [N_EXPERTS]."""
    if case == "uneven":
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(0, 5, (N_EXPERTS,), generator=generator)
    if case == "all to one":
        return torch.nn.functional.one_hot(torch.tensor(5), N_EXPERTS) * (3 + rank)
    if case == "a rank sends nothing":
        return torch.full((N_EXPERTS,), int(rank != 1))
    return torch.zeros(N_EXPERTS, dtype=torch.int64)


def send_and_return(rank: int, layout: Layout, case: str, way: str, n_dropped: int) -> dict[str, Any]:
    groups = groups_of(layout, rank)
    dispatcher = groups.dispatcher(**WAYS[way])
    counts = counts_of(rank, case)
    n_kept = int(counts.sum())
    # Each row holds its rank and its expert.
    experts = torch.repeat_interleave(torch.arange(N_EXPERTS), counts).tolist() + [-1] * n_dropped
    rows = torch.tensor([[float(rank), e, i] for i, e in enumerate(experts)], dtype=torch.float64)
    rows = rows.reshape(n_kept + n_dropped, D).requires_grad_()
    route = dispatcher.plan(counts, len(rows), is_dropless=n_dropped == 0)
    order = torch.arange(len(rows)) if route.order_N is None else route.order_N
    cuts = [chunk.n_sent for chunk in route.chunks]
    *parts, dropped = permute_rows(rows, order, invert(order)).split([*cuts, len(rows) - sum(cuts)])
    sent = [dispatcher.dispatch(part, chunk) for part, chunk in zip(parts, route.chunks, strict=True)]
    received = [wait() for wait in sent]
    returning = [dispatcher.combine(part, chunk) for part, chunk in zip(received, route.chunks, strict=True)]
    back = torch.cat([*(wait() for wait in returning), dropped])
    back = permute_rows(back, invert(order), order)
    slope = torch.arange(back.numel(), dtype=torch.float64).view_as(back)
    (back * slope).sum().backward()
    return {
        "rows": rows.detach(),
        "received": [part.detach() for part in received],
        "counts": [chunk.counts_L for chunk in route.chunks],
        "is_over_limit": route.is_over_limit,
        "n_extra": route.n_extra,
        "back": back.detach(),
        "gradient": rows.grad,
        "slope": slope,
    }


@pytest.mark.parametrize("n_dropped", [0, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["uneven", "all to one", "a rank sends nothing", "nothing at all"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_reach_their_expert_and_come_back(layout: Layout, case: str, way: str, n_dropped: int) -> None:
    results = run_ranks(send_and_return, layout.world_size, layout, case, way, n_dropped)
    for rank, got in enumerate(results):
        assert torch.equal(got["back"], got["rows"])
        assert torch.equal(got["gradient"], got["slope"])
        mine = layout.local_experts(rank, N_EXPERTS)
        for received, counts in zip(got["received"], got["counts"], strict=True):
            want = [float(e) for e, n in zip(mine, counts.tolist(), strict=True) for _ in range(n)]
            assert received[:, 1].tolist() == want
        peers = layout.ep_group(rank)
        sent = sum(int(counts_of(peer, case)[list(mine)].sum()) for peer in peers)
        assert sum(map(len, got["received"])) == sent
        assert len(got["received"]) == len(results[peers[0]]["received"])
        if layout.ep > 1:
            check_chunks(layout, [results[peer] for peer in peers], WAYS[way])


def check_chunks(layout: Layout, results: list[dict[str, Any]], way: dict[str, Any]) -> None:
    """Check that a group sends min_chunks chunks, and more only if a rank would receive too many rows."""
    loads = [sum(map(len, got["received"])) for got in results]
    limit = way.get("max_load", float("inf")) * sum(loads) / len(loads) if any(loads) else float("inf")
    n_chunks = len(results[0]["received"])
    for got in results:
        # Rounding can add one row of each sender.
        assert all(len(part) <= limit + layout.ep for part in got["received"])
        assert got["is_over_limit"] == (max(loads) > limit)
        assert got["n_extra"] == n_chunks - way.get("min_chunks", 1)
    if "max_load" not in way:
        assert n_chunks == way.get("min_chunks", 1)
    assert n_chunks >= way.get("min_chunks", 1)
    assert n_chunks == 1 or max(loads) > limit * (n_chunks - 1) or n_chunks == way.get("min_chunks")
    assert n_chunks <= max(*loads, way.get("min_chunks", 1)), "a chunk without a row on any rank"


def share_a_gradient(rank: int, layout: Layout) -> tuple[list[float], list[float]]:
    """Enter a split layer, and use another tensor whose gradient is the very same tensor."""
    tp = groups_of(layout, rank).tensor_parallel()
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    beside = 1.0 * other  # computed first, so that its gradient is used after that of x has been summed
    ((tp.enter(x) + beside) * (rank + 1)).sum().backward()
    assert x.grad is not None and other.grad is not None
    return x.grad.tolist(), other.grad.tolist()


def test_a_gradient_that_is_summed_over_ranks_is_not_summed_for_its_other_users() -> None:
    sums = [3.0] * 3
    assert run_ranks(share_a_gradient, 2, Layout(2, tp=2)) == [(sums, [1.0] * 3), (sums, [2.0] * 3)]
