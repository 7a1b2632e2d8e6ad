"""Rows in chunks, recorded collectives and recomputed routes on the one rank of this process.

tests/distributed does the same with several ranks, which really send each other rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.assertions import assert_same_grads
from tests.layouts import groups_of
from tests.models import packed_inputs, random_state, tiny_config, tiny_decoder
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterStats
from turnout.moe.model import Decoder, build_decoder
from turnout.moe.parallel.expert_parallel import AllToAllDispatcher, Dispatcher, LocalDispatcher, Route
from turnout.moe.parallel.tensor_parallel import SplitOverGroup, TensorParallel
from turnout.moe.recompute import Recompute
from turnout.training.parallel.layout import Layout

CFG = tiny_config(n_layers=3, n_dense_layers=1, d_ff=24, n_shared_experts=1)
CAPPED = tiny_config(n_layers=3, n_dense_layers=1, d_ff=24, router={"capacity_factor": 1.0})
EXPERT_OPERATIONS = ("all-gather of counts", "all-to-all of rows")


def built(
    dispatcher: Dispatcher | None = None,
    *,
    tp: TensorParallel | None = None,
    recompute: Recompute = "none",
    cfg: ModelConfig = CFG,
) -> Decoder:
    decoder = build_decoder(cfg, dtype=torch.float64, dispatcher=dispatcher, tp=tp, recompute=recompute)
    decoder.load_state_dict(tiny_decoder(cfg).state_dict())
    return decoder


def passes(decoder: Decoder) -> tuple[Tensor, dict[str, Tensor | None], RouterStats]:
    """Return the loss, the gradients by name and the routers' statistics."""
    tokens, doc_ids, is_counted = packed_inputs(decoder.cfg)
    hidden, stats = decoder(tokens, doc_ids, is_counted, random_state(decoder.cfg, bias=0.05))
    loss = decoder.logits(hidden).square().sum() + stats.balance_sum.sum()
    loss.backward()
    return loss, {name: p.grad for name, p in decoder.named_parameters()}, stats


# Of 54 rows. n_extra: chunks that the limit makes necessary, beyond min_chunks.
@pytest.mark.parametrize("cfg", [CFG, CAPPED], ids=["dropless", "rows dropped"])
@pytest.mark.parametrize(
    ("max_load", "min_chunks", "n_extra"),
    [(None, 1, 0), (None, 3, 0), (1.0, 1, 0), (1.0, 2, 0), (0.5, 1, 1), (0.3, 2, 2), (0.34, 3, 0)],
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_chunks_change_nothing_and_those_for_the_limit_alone_are_counted(
    recompute: Recompute,
    max_load: float | None,
    min_chunks: int,
    n_extra: int,
    cfg: ModelConfig,
    one_rank: None,
) -> None:
    group = groups_of(Layout(1), 0).ep
    dispatcher = AllToAllDispatcher(group, max_load=max_load, min_chunks=min_chunks)
    want_loss, want_grads, _ = passes(built(cfg=cfg))
    loss, grads, stats = passes(built(dispatcher, recompute=recompute, cfg=cfg))
    assert stats.n_extra_chunks.tolist() == [n_extra, n_extra]
    torch.testing.assert_close(loss, want_loss, rtol=1e-13, atol=0)
    assert_same_grads(grads, want_grads, rtol=1e-10)


@dataclass
class Counting(LocalDispatcher):
    """Counts the routes that are planned."""

    n_plans: int = 0

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        self.n_plans += 1
        return super().plan(counts_E, n_rows, is_dropless=is_dropless)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_route_is_planned_once_a_layer_and_not_again_in_a_recomputation(recompute: Recompute) -> None:
    """With experts on several ranks each plan waits for the device and for the other ranks."""
    dispatcher = Counting()
    passes(built(dispatcher, recompute=recompute))
    assert dispatcher.n_plans == 2


@dataclass
class Log:
    """Records each layer's collectives, forward and backward."""

    found: set[tuple[str, str, int | None]] = field(default_factory=set)

    @contextmanager
    def __call__(
        self,
        operation: str,
        group: str,
        *,
        layer: int | None = None,
        sent: Sequence[int] = (),
        received: Sequence[int] = (),
    ) -> Iterator[None]:
        self.found.add((operation, group, layer))
        yield


def test_collectives_are_recorded_with_their_layer(one_rank: None) -> None:
    """The first layer is dense. Embedding, final norm and head belong to no layer."""
    groups, log = groups_of(Layout(1), 0), Log()
    passes(built(AllToAllDispatcher(groups.ep, log), tp=SplitOverGroup(groups.tp, record=log)))
    experts = {(operation, "ep", layer) for operation in EXPERT_OPERATIONS for layer in (1, 2)}
    assert {entry for entry in log.found if entry[1] == "ep"} == experts
    assert {layer for operation, _, layer in log.found if operation == "all-reduce"} == {0, 1, 2, None}
