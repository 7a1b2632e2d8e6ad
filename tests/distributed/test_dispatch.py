"""Dispatch and combine over real ranks: identity experts return rows as they went, and gradients too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.dispatch import Route
from tests.layouts import groups_of
from tests.ranks import run_ranks
from training.parallel import Layout

N_EXPERTS, D = 8, 3
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


def send_and_return(rank: int, layout: Layout, case: str, n_dropped: int) -> dict[str, Any]:
    groups = groups_of(layout, rank)
    dispatcher = groups.dispatcher()
    counts = counts_of(rank, case)
    n_rows = int(counts.sum()) + n_dropped
    # Each row says whose it is and for which expert.
    experts = torch.repeat_interleave(torch.arange(N_EXPERTS), counts).tolist() + [-1] * n_dropped
    rows = torch.tensor([[float(rank), e, i] for i, e in enumerate(experts)], dtype=torch.float64)
    rows = rows.reshape(n_rows, D).requires_grad_()
    route: Route = dispatcher.plan(counts, n_rows, is_dropless=n_dropped == 0)
    arrived = dispatcher.dispatch(rows, route)
    back = dispatcher.combine(arrived, route)
    slope = torch.arange(back.numel(), dtype=torch.float64).view_as(back)
    (back * slope).sum().backward()
    return {
        "rows": rows.detach(),
        "arrived": arrived.detach(),
        "counts": route.counts_L,
        "back": back.detach(),
        "gradient": rows.grad,
        "slope": slope,
        "n_kept": n_rows - n_dropped,
    }


@pytest.mark.parametrize("n_dropped", [0, 2])
@pytest.mark.parametrize("case", ["uneven", "all to one", "a rank sends nothing", "nothing at all"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_reach_their_expert_and_come_back(layout: Layout, case: str, n_dropped: int) -> None:
    results = run_ranks(send_and_return, layout.world_size, layout, case, n_dropped)
    for rank, got in enumerate(results):
        kept = got["n_kept"]
        assert torch.equal(got["back"][:kept], got["rows"][:kept])
        assert torch.equal(got["gradient"][:kept], got["slope"][:kept])
        assert not got["back"][kept:].any() and not got["gradient"][kept:].any()
        mine = layout.local_experts(rank, N_EXPERTS)
        assert got["arrived"][:, 1].tolist() == sorted(got["arrived"][:, 1].tolist())
        for expert, n in zip(mine, got["counts"].tolist(), strict=True):
            assert (got["arrived"][:, 1] == expert).sum() == n
        sent = sum(int(counts_of(peer, case)[list(mine)].sum()) for peer in layout.ep_group(rank))
        assert len(got["arrived"]) == sent
