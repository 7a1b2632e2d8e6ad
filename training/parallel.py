"""Which rank does what.

`Layout` is integers only; `Groups` holds the process groups and is passed, never looked up.

One block of ranks is factored twice, innermost contiguous:
    dense parameters   rank = dp_rank * tp + tp_rank
    routed experts     rank = edp_rank * ep + ep_rank
so world_size = dp * tp = edp * ep, and an expert-parallel group may span tensor-parallel ranks.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import RunConfig
from training.errors import ConfigError

# How long a collective may wait for a rank before it is taken for dead.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class Layout:
    """The two factorisations of world_size ranks."""

    world_size: int
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, size in (("tp", self.tp), ("ep", self.ep)):
            if size < 1 or self.world_size % size:
                raise ConfigError(
                    f"parallel.{name}={size} must divide world_size={self.world_size}; "
                    f"use one of {divisors(self.world_size)}"
                )

    @property
    def dp(self) -> int:
        return self.world_size // self.tp

    @property
    def edp(self) -> int:
        return self.world_size // self.ep

    def dp_rank(self, rank: int) -> int:
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp

    def edp_rank(self, rank: int) -> int:
        return rank // self.ep

    def ep_rank(self, rank: int) -> int:
        return rank % self.ep

    def tp_groups(self) -> list[list[int]]:
        """Return the ranks that share one copy of the dense parameters, group by group."""
        return _contiguous(self.world_size, self.tp)

    def dp_groups(self) -> list[list[int]]:
        """Return the ranks that hold the same shard of the dense parameters."""
        return _strided(self.world_size, self.tp)

    def ep_groups(self) -> list[list[int]]:
        """Return the ranks that share one copy of the experts and exchange rows."""
        return _contiguous(self.world_size, self.ep)

    def edp_groups(self) -> list[list[int]]:
        """Return the ranks that hold the same experts."""
        return _strided(self.world_size, self.ep)

    def local_experts(self, rank: int, n_experts: int) -> range:
        """Return the global ids of the experts on a rank."""
        n_local = n_experts // self.ep
        first = self.ep_rank(rank) * n_local
        return range(first, first + n_local)


def _contiguous(world_size: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def _strided(world_size: int, stride: int) -> list[list[int]]:
    return [list(range(start, world_size, stride)) for start in range(stride)]


def plan_layout(cfg: RunConfig, world_size: int) -> Layout:
    """Return the layout of a run on world_size ranks, or raise ConfigError with a remedy."""
    layout = Layout(world_size, tp=cfg.parallel.tp, ep=cfg.parallel.ep)
    n_experts, n_kv_heads = cfg.model.n_experts, cfg.model.n_kv_heads
    if n_experts % layout.ep:
        fits = [d for d in divisors(n_experts) if world_size % d == 0]
        raise ConfigError(
            f"parallel.ep={layout.ep} must divide model.n_experts={n_experts}; use one of {fits}"
        )
    if n_kv_heads % layout.tp:
        fits = [d for d in divisors(n_kv_heads) if world_size % d == 0]
        raise ConfigError(
            f"parallel.tp={layout.tp} must divide model.n_kv_heads={n_kv_heads}; use one of {fits}"
        )
    # TODO(when expert and tensor parallelism are built): drop this refusal.
    for name, size in (("tp", layout.tp), ("ep", layout.ep)):
        if size > 1:
            raise ConfigError(
                f"parallel.{name}={size}: only data parallelism is built so far; use parallel.{name}=1"
            )
    n_microbatches(cfg, layout)
    return layout


def n_microbatches(cfg: RunConfig, layout: Layout) -> int:
    """Return how many micro-batches each rank accumulates per optimizer step."""
    per_round = layout.dp * cfg.train.microbatch_seqs
    if cfg.batch_seqs % per_round:
        fits = [d for d in divisors(cfg.batch_seqs) if cfg.batch_seqs % (d * layout.dp) == 0]
        n_ranks = [
            d for d in divisors(cfg.batch_seqs) if cfg.batch_seqs % (d * cfg.train.microbatch_seqs) == 0
        ]
        remedy = f"use train.microbatch_seqs from {fits}" if fits else f"use one of {n_ranks} ranks"
        if not fits and not n_ranks:
            remedy = (
                f"use train.microbatch_seqs from {divisors(cfg.batch_seqs)}, or another train.batch_tokens"
            )
        raise ConfigError(
            f"train.batch_tokens={cfg.train.batch_tokens} is {cfg.batch_seqs} sequences, which {layout.dp} "
            f"data-parallel ranks x train.microbatch_seqs={cfg.train.microbatch_seqs} do not divide; {remedy}"
        )
    return cfg.batch_seqs // per_round


class Groups:
    """This process's rank and its process groups, built once by `join_groups`."""

    def __init__(self, layout: Layout, rank: int, device: torch.device) -> None:
        self.layout, self.rank, self.device = layout, rank, device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_rank(self.rank)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum a tensor in place over the ranks that hold different tokens, and return it."""
        if self.layout.dp > 1:
            dist.all_reduce(values)
        return values

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Take the elementwise maximum in place over all ranks, and return it."""
        if self.layout.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def collect(self, value: float) -> list[float]:
        """Return every rank's value, by rank."""
        values = torch.zeros(self.layout.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return self.sum_over_tokens(values).tolist()

    def barrier(self) -> None:
        if self.layout.world_size > 1:
            dist.barrier()


def local_device() -> torch.device:
    """Return the device of this process: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def join_groups(layout: Layout, device: torch.device) -> Groups:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR,
    ...).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return Groups(layout, dist.get_rank(), device)


def leave_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def name_ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
