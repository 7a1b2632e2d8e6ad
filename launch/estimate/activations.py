"""The memory that a micro-batch's forward and backward add on a rank, measured on fake tensors.

The real decoder and loss run, and torch's MemTracker follows each tensor; no memory is allocated and nothing
is computed. Contract: routing is uniform, so a rank receives as many rows as it sends, and each sequence has
two documents of unequal length. Scratch memory inside an operator is not counted, except that of the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from turnout.data.loader import Batch
from turnout.moe.config import ModelConfig
from turnout.moe.experts.experts import Experts
from turnout.moe.experts.sorted_loop import ROWS_AT_ONCE
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.moe.parallel.expert_parallel import (
    AllToAllDispatcher,
    Chunk,
    Dispatcher,
    LocalDispatcher,
    Route,
)
from turnout.moe.parallel.tensor_parallel import SplitOverGroup, TensorParallel, Unsplit
from turnout.training.config.run import RunConfig
from turnout.training.hardware import DTYPES, expert_backend_of
from turnout.training.objective import Objective
from turnout.training.parallel.layout import Layout

# Expert layers of the two decoders that are run: every further layer adds the difference between them.
FEW, MORE = 1, 2


def activation_bytes(cfg: RunConfig, layout: Layout) -> int:
    """Return the peak bytes of forward and backward of one micro-batch, beyond weights and gradients."""
    model = cfg.model
    few = _measure(cfg, layout, _cut(model, n_moe=FEW, n_dense=0))
    per_layer = (_measure(cfg, layout, _cut(model, n_moe=MORE, n_dense=0)) - few) // (MORE - FEW)
    total = few + (model.n_moe_layers - FEW) * per_layer
    if model.n_dense_layers:
        per_dense = _measure(cfg, layout, _cut(model, n_moe=FEW, n_dense=1)) - few
        total += model.n_dense_layers * per_dense
    return total


def backend_measured(cfg: RunConfig) -> str:
    """Return the expert backend whose tensors are counted: the one that the run would use on this machine.

    Loops are counted as sorted_loop and grouped products as torch_grouped, which keep the same tensors.
    """
    chosen = expert_backend_of(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return "sorted_loop" if chosen in ("reference", "sorted_loop", "compiled_loop") else "torch_grouped"


def _cut(model: ModelConfig, *, n_moe: int, n_dense: int) -> ModelConfig:
    return model.model_copy(update={"n_layers": n_moe + n_dense, "n_dense_layers": n_dense})


def _measure(cfg: RunConfig, layout: Layout, model: ModelConfig) -> int:
    # Imported here because it takes a second, which a run's launch need not wait for.
    from torch.distributed._tools.mem_tracker import MemTracker

    n_seqs, seq_len = cfg.train.microbatch_seqs, model.seq_len
    with torch.device("meta"):
        decoder = Decoder(
            model,
            dispatcher=_dispatcher(layout),
            tp=_tensor_parallel(cfg, layout),
            expert_backend=backend_measured(cfg),
            recompute=cfg.train.recompute,
        )
    for module in decoder.modules():
        if isinstance(module, Experts) and backend_measured(cfg) == "sorted_loop":
            module.backend = replace(module.backend, apply=_SortedLoop.apply)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(decoder, DTYPES[cfg.train.precision])
        tokens = torch.zeros(n_seqs, seq_len, dtype=torch.int64)
        state = RouterState.initial(model)
    # A real tensor, since the host reads the lengths of documents. The passes run outside the mode, where an
    # operator with a fake input has a fake result all the same.
    doc_ids = (torch.arange(seq_len) >= seq_len // 3).long().repeat(n_seqs, 1)
    objective, batch = Objective(decoder), Batch(tokens, tokens, doc_ids, tokens[:, 0])
    tracker = MemTracker()
    tracker.track_external(objective, tokens)
    (before,) = tracker.get_tracker_snapshot("current").values()
    with tracker:
        objective(batch, state).total.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] - before["Total"]


def _materialise(decoder: Decoder, dtype: torch.dtype) -> None:
    """Give each parameter a fake tensor on the CPU, and a gradient, so that the passes do not add one."""
    for name, parameter in list(decoder.named_parameters()):
        module_name, _, leaf = name.rpartition(".")
        fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        fake.grad = torch.zeros_like(fake)
        setattr(decoder.get_submodule(module_name), leaf, fake)


class _SortedLoop(torch.autograd.Function):
    """sorted_loop's tensors, and the scratch tensors inside its backward operator."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor, *matrices: Tensor) -> Tensor:
        out_RD: Tensor
        out_RD, products_RJ = torch.ops.turnout.sorted_loop(rows_RD, weights_R, counts_L, *matrices, False)
        ctx.save_for_backward(rows_RD, weights_R, counts_L, products_RJ, *matrices)
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        results = torch.ops.turnout.sorted_loop_backward(grads[0].contiguous(), *saved, False)
        n_rows, d_expert = min(len(saved[0]), ROWS_AT_ONCE), saved[-1].size(2)
        # For the rows of one block of sorted_loop: hidden activations, their gradient, silu(gate), and two
        # gradients of products.
        scratch = [grads[0].new_empty(n_rows, d_expert) for _ in range(5)]
        del scratch
        return *results[:2], None, *results[2:]


@dataclass(frozen=True)
class _Group:
    """The parts of a process group that a model uses outside of collectives."""

    n_ranks: int

    def size(self) -> int:
        return self.n_ranks

    def rank(self) -> int:
        return 0


def _silent_group(n_ranks: int) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, _Group(n_ranks))


class _LocalUniform(LocalDispatcher):
    """Uniform routing, so no expert exceeds its capacity."""

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        return super().plan(counts_E, n_rows, is_dropless=True)


class _UniformOverGroup(AllToAllDispatcher):
    """All ranks send each other equally many rows; nothing is sent."""

    def plan(self, counts_E: Tensor, n_rows: int, *, is_dropless: bool) -> Route:
        n_ranks = self.group.size()
        rows = tuple(n_rows // n_ranks + (rank < n_rows % n_ranks) for rank in range(n_ranks))
        order_R = counts_E.new_empty(n_rows)
        counts_L = counts_E.view(n_ranks, -1).sum(0)
        return Route((Chunk(counts_L, rows, rows, order_R, torch.empty_like(order_R)),))

    def send(
        self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> tuple[Callable[[], object], Tensor]:
        return lambda: None, rows.new_empty(sum(received), *rows.shape[1:])


class _SplitOverSilence(SplitOverGroup):
    """The tensors of a split model, allocated without any communication."""

    def _all_reduce(self, x: Tensor, op: Any = None) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def _all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(x.size(0) * self.size, *x.shape[1:])

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        return x.new_empty(x.size(0) // self.size, *x.shape[1:])


def _dispatcher(layout: Layout) -> Dispatcher:
    return _LocalUniform() if layout.ep == 1 else _UniformOverGroup(_silent_group(layout.ep))


def _tensor_parallel(cfg: RunConfig, layout: Layout) -> TensorParallel:
    if layout.tp == 1:
        return Unsplit()
    return _SplitOverSilence(_silent_group(layout.tp), cfg.parallel.sequence_parallel)
