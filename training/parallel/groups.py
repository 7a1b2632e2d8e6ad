"""The process groups of a layout. They are passed as arguments, never looked up globally."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.moe.parallel.expert_parallel import AllToAllDispatcher, Dispatcher, LocalDispatcher
from turnout.moe.parallel.sharding import split_of
from turnout.moe.parallel.tensor_parallel import SplitOverGroup, TensorParallel, Unsplit
from turnout.training.parallel.flight_recorder import NullRecorder, Recorder
from turnout.training.parallel.layout import Layout


class Groups:
    """This process's rank and its process groups. Building them is collective: every rank takes part.

    timeout_s: seconds a collective waits for a rank before that rank is considered dead.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        device: torch.device,
        *,
        timeout_s: float = 600,
        recorder: Recorder | None = None,
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
        """Sum a tensor [...] in place over the ranks that hold different tokens, and return it."""
        return self._reduce(values, "dp", self.dp)

    def sum_over_expert_replicas(self, values: Tensor) -> Tensor:
        """Sum a tensor [...] in place over the ranks that hold the same experts, and return it."""
        return self._reduce(values, "edp", self.edp)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum a tensor [...] in place over all ranks, and return it."""
        return self._reduce(values, "world", None)

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Take the elementwise maximum of a tensor [...] in place over all ranks, and return it."""
        return self._reduce(values, "world", None, dist.ReduceOp.MAX)

    def collect(self, value: float) -> list[float]:
        """Return every rank's value, in the order of ranks. Collective."""
        values = torch.zeros(self.layout.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return self.sum_over_ranks(values).tolist()

    def all_agree(self, condition: bool) -> bool:
        """Return whether the condition holds on every rank. Collective."""
        return not self.max_over_ranks(torch.tensor(int(not condition), device=self.device))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.layout.world_size > 1:
            with self.recorder.collective("barrier", "world"):
                dist.barrier()

    def close(self) -> None:
        """Destroy the process groups, so that the same ranks can form another layout. Collective."""
        for group in (self.dp, self.tp, self.ep, self.edp):
            dist.destroy_process_group(group)

    def dispatcher(self, *, max_load: float | None = None, min_chunks: int = 1) -> Dispatcher:
        """Return the dispatcher of routed rows to their experts; AllToAllDispatcher explains the settings."""
        if self.layout.ep == 1:
            return LocalDispatcher()
        return AllToAllDispatcher(self.ep, self.recorder.collective, max_load=max_load, min_chunks=min_chunks)

    def tensor_parallel(self, *, sequence_parallel: bool = False) -> TensorParallel:
        """Return the tensor parallelism of this rank's group."""
        if self.layout.tp == 1:
            return Unsplit()
        return SplitOverGroup(self.tp, sequence_parallel, self.recorder.collective)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor of a parameter's name, gathered from the ranks' parts. Collective.

        part: this rank's parameter, or a tensor of its shape [...] such as its gradient or moment.
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
    """Create all of these groups, in the same order on every rank, and return the one with this rank."""
    built: dict[tuple[int, ...], dist.ProcessGroup] = {
        tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in groups
    }
    return next(group for ranks, group in built.items() if rank in ranks)


def local_device() -> torch.device:
    """Return the device of this process: its GPU if the machine has any, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def join_groups(layout: Layout, device: torch.device, *, timeout_s: float, recorder: Recorder) -> Groups:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Collective. The recorder notes every collective of the groups.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Groups(layout, dist.get_rank(), device, timeout_s=timeout_s, recorder=recorder)


def leave_groups() -> None:
    """Destroy this process's process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
