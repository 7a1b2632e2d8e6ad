"""The process groups of a layout. They are passed, never looked up."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.moe.parallel.expert_parallel import AllToAllDispatcher, Dispatcher, LocalDispatcher
from turnout.moe.parallel.sharding import split_of
from turnout.moe.parallel.tensor_parallel import SplitOverGroup, TensorParallel, Unsplit
from turnout.training.parallel.flight_recorder import NullRecorder
from turnout.training.parallel.layout import Layout


class Groups:
    """This process's rank and its process groups. Building them is collective: every rank takes part.

    timeout_s: how long a collective may wait for a rank before it is taken for dead.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        device: torch.device,
        *,
        timeout_s: float = 600,
        recorder: NullRecorder | None = None,
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        self.recorder = recorder or NullRecorder()
        timeout = timedelta(seconds=timeout_s)
        self.dp = _join(layout.dp_groups(), rank, timeout)
        self.tp = _join(layout.tp_groups(), rank, timeout)
        self.ep = _join(layout.ep_groups(), rank, timeout)
        self.edp = _join(layout.edp_groups(), rank, timeout)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_rank(self.rank)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum a tensor in place over the ranks that hold different tokens, and return it."""
        return self._reduce(values, "dp", self.dp)

    def sum_over_expert_replicas(self, values: Tensor) -> Tensor:
        """Sum a tensor in place over the ranks that hold the same experts, and return it."""
        return self._reduce(values, "edp", self.edp)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum a tensor in place over all ranks, and return it."""
        return self._reduce(values, "world", None)

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Take the elementwise maximum in place over all ranks, and return it."""
        return self._reduce(values, "world", None, dist.ReduceOp.MAX)

    def collect(self, value: float) -> list[float]:
        """Return every rank's value, by rank."""
        values = torch.zeros(self.layout.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return self.sum_over_ranks(values).tolist()

    def all_agree(self, is_so: bool) -> bool:
        """Return whether it is so on every rank."""
        return not self.max_over_ranks(torch.tensor(int(not is_so), device=self.device))

    def barrier(self) -> None:
        if self.layout.world_size > 1:
            with self.recorder.collective("barrier", "world"):
                dist.barrier()

    def close(self) -> None:
        """Leave the process groups, for what lays out the same ranks again. Collective."""
        for group in (self.dp, self.tp, self.ep, self.edp):
            dist.destroy_process_group(group)

    def dispatcher(self, *, max_load: float | None = None, min_chunks: int = 1) -> Dispatcher:
        """Return how routed rows reach their experts; AllToAllDispatcher says what the settings mean."""
        if self.layout.ep == 1:
            return LocalDispatcher()
        return AllToAllDispatcher(self.ep, self.recorder.collective, max_load=max_load, min_chunks=min_chunks)

    def tensor_parallel(self, *, sequence_parallel: bool = False) -> TensorParallel:
        """Return how matrices are split."""
        if self.layout.tp == 1:
            return Unsplit()
        return SplitOverGroup(self.tp, sequence_parallel, self.recorder.collective)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor of a parameter's name from the ranks' parts. Collective.

        part: the parameter of this rank, or anything of its shape (gradient, moment).
        """
        split = split_of(name)
        if split is None:
            return part
        group = self.tp if split.over == "tp" else self.ep
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        with self.recorder.collective("all-gather", split.over):
            dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, split.dim)

    def _reduce(
        self,
        values: Tensor,
        name: str,
        group: dist.ProcessGroup | None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    ) -> Tensor:
        n_ranks = self.layout.world_size if group is None else group.size()
        if n_ranks > 1:
            with self.recorder.collective("all-reduce", name):
                dist.all_reduce(values, op, group=group)
        return values


def _join(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Build all of these groups, in the same order on every rank, and return the one that holds this rank."""
    built = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in groups}
    return next(group for ranks, group in built.items() if rank in ranks)


def local_device() -> torch.device:
    """Return the device of this process: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def join_groups(layout: Layout, device: torch.device, *, timeout_s: float, recorder: NullRecorder) -> Groups:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR,
    ...).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Groups(layout, dist.get_rank(), device, timeout_s=timeout_s, recorder=recorder)


def leave_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
