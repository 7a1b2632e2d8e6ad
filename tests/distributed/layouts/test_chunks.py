"""Rows in chunks: a rank stays within its limit whatever the routing, and computes while it sends."""

import gc
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from tests.layouts import groups_of
from tests.models import tiny_config
from tests.ranks import run_ranks
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.recompute import RoutingMemo, recompute_if
from turnout.moe.router import Routing
from turnout.training.parallel.layout import Layout

CFG = tiny_config(d_model=16, d_expert=64, n_experts=8, top_k=2, seq_len=64, n_shared_experts=1)


class Kept:
    """Counts the bytes that autograd keeps, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def collapsed_routing(n_tokens: int) -> Routing:
    """Send every token to the first two experts. The first rank holds both."""
    ids = torch.tensor([0, 1]).expand(n_tokens, 2).contiguous()
    return Routing(ids, torch.rand(n_tokens, 2).requires_grad_(), None)


def even_routing(n_tokens: int) -> Routing:
    ids = torch.arange(2 * n_tokens).view(n_tokens, 2) % CFG.n_experts
    return Routing(ids, torch.rand(n_tokens, 2).requires_grad_(), None)


def routed(layer: MoELayer, x: torch.Tensor, routing: Routing, memo: RoutingMemo) -> torch.Tensor:
    """Return the output of the routed experts, [T, D] as x."""
    return layer._receive(layer._send(x, routing, memo))


def bytes_kept(rank: int, layout: Layout, max_load: float | None, is_collapsed: bool) -> tuple[int, int]:
    """Return the bytes that a layer keeps for its backward pass, and its extra chunks."""
    torch.manual_seed(0)
    dispatcher = groups_of(layout, rank).dispatcher(max_load=max_load)
    layer = MoELayer(CFG, dispatcher, Unsplit(), "sorted_loop", "none")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, kept = torch.randn(256, CFG.d_model, requires_grad=True), Kept()
    memo = RoutingMemo()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        out = routed(layer, x, (collapsed_routing if is_collapsed else even_routing)(256), memo)
    out.sum().backward()
    assert memo.route is not None
    return sum(kept.storages.values()), memo.route.n_extra


def test_a_collapsed_routing_keeps_no_more_than_an_even_one() -> None:
    layout = Layout(4, ep=4)
    even, *_ = (n for n, _ in run_ranks(bytes_kept, 4, layout, 2.0, False))
    collapsed, *_ = (n for n, _ in run_ranks(bytes_kept, 4, layout, None, True))
    assert collapsed > 2 * even, "without a limit the first rank keeps every rank's rows"
    for max_load, n_extra in ((2.0, 1), (1.0, 3)):
        results = run_ranks(bytes_kept, 4, layout, max_load, True)
        assert {n for _, n in results} == {n_extra}
        assert results[0][0] <= even


def rows_alive(rank: int, layout: Layout) -> int:
    """Return how many tensors of the size of all routed rows Python holds after a recomputed forward pass."""
    torch.manual_seed(0)
    layer = MoELayer(CFG, groups_of(layout, rank).dispatcher(max_load=1.0), Unsplit(), "sorted_loop", "none")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, memo = torch.randn(256, CFG.d_model, requires_grad=True), RoutingMemo()
    out = recompute_if(True, routed, layer, x, collapsed_routing(256), memo)
    gc.collect()
    n_bytes = 2 * x.nbytes
    alive = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
    n_alive = sum(tensor.untyped_storage().nbytes() == n_bytes for tensor in alive)
    out.sum().backward()
    assert memo.route is not None and memo.route.is_over_limit
    return n_alive


def test_a_recomputed_layer_over_its_limit_keeps_no_rows() -> None:
    assert run_ranks(rows_alive, 4, Layout(4, ep=4)) == [0] * 4


def meet_while_rows_are_sent(rank: int, layout: Layout, directory: Path) -> None:
    """Run a layer on two ranks. The first one's shared experts wait until the second has received its rows,
    and in the backward pass its gradients.
    """
    torch.manual_seed(0)
    layer = MoELayer(CFG, groups_of(layout, rank).dispatcher(), Unsplit(), "reference", "none")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert layer.shared is not None
    if rank == 0:
        layer.shared.register_forward_hook(lambda *_: wait_for(directory / "rows"))
        layer.shared.up.weight.register_hook(lambda _: wait_for(directory / "gradients"))
    else:
        layer.experts.register_forward_pre_hook(lambda *_: (directory / "rows").touch())
    state = torch.zeros(CFG.n_experts), torch.full((CFG.n_experts,), 1 / CFG.n_experts)
    x = torch.randn(CFG.seq_len, CFG.d_model, requires_grad=True)
    out, _ = layer(x, *state, torch.ones(CFG.seq_len, dtype=torch.bool), RoutingMemo())
    out.sum().backward()
    if rank == 1:
        (directory / "gradients").touch()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name} were received in the meantime"
        time.sleep(0.01)


def test_shared_experts_are_computed_while_rows_are_sent(tmp_path: Path) -> None:
    run_ranks(meet_while_rows_are_sent, 2, Layout(2, ep=2), tmp_path)


def meet_in_the_next_chunk(rank: int, layout: Layout, directory: Path) -> None:
    """Run two chunks. The first rank computes chunk 1 only when the second rank has received chunk 2."""
    torch.manual_seed(0)
    dispatcher = groups_of(layout, rank).dispatcher(min_chunks=2)
    layer = MoELayer(CFG, dispatcher, Unsplit(), "reference", "none")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    calls = itertools.count()

    def meet(*_: Any) -> None:
        call = next(calls)
        if rank == 0 and call == 0:
            wait_for(directory / "rows")
        if rank == 1 and call == 1:
            (directory / "rows").touch()

    layer.experts.register_forward_pre_hook(meet)
    x = torch.randn(CFG.seq_len, CFG.d_model, requires_grad=True)
    routed(layer, x, even_routing(CFG.seq_len), RoutingMemo()).sum().backward()
    assert next(calls) == 2


def test_the_next_chunk_is_sent_while_one_is_computed(tmp_path: Path) -> None:
    run_ranks(meet_in_the_next_chunk, 2, Layout(2, ep=2), tmp_path)
