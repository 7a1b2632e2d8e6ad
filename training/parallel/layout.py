"""Which rank belongs to which groups, in integers only: nothing here needs torch.

One block of ranks is factored twice, innermost contiguous:
    dense parameters   rank = dp_rank * tp + tp_rank
    routed experts     rank = edp_rank * ep + ep_rank
so world_size = dp * tp = edp * ep, and an expert-parallel group may span tensor-parallel ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from turnout.moe.config import ModelConfig
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError


def divisors(n: int) -> list[int]:
    """Return the divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class Layout:
    """The two factorisations of world_size ranks. Raises ConfigError if a size does not divide it."""

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
        """Return the groups of ranks that split one copy of the dense parameters."""
        return _contiguous(self.world_size, self.tp)

    def dp_groups(self) -> list[list[int]]:
        """Return the groups of ranks that hold the same part of the dense parameters."""
        return _strided(self.world_size, self.tp)

    def ep_groups(self) -> list[list[int]]:
        """Return the groups of ranks that split one copy of the experts and exchange rows."""
        return _contiguous(self.world_size, self.ep)

    def edp_groups(self) -> list[list[int]]:
        """Return the groups of ranks that hold the same experts."""
        return _strided(self.world_size, self.ep)

    def ep_group(self, rank: int) -> list[int]:
        return next(ranks for ranks in self.ep_groups() if rank in ranks)

    def edp_group(self, rank: int) -> list[int]:
        return next(ranks for ranks in self.edp_groups() if rank in ranks)

    def local_experts(self, rank: int, n_experts: int) -> range:
        """Return the global ids of the experts on a rank."""
        n_local = n_experts // self.ep
        first = self.ep_rank(rank) * n_local
        return range(first, first + n_local)


def has_own_expert_groups(layout: Layout) -> bool:
    """Return whether experts are reduced over other ranks than the dense parameters.

    Under tensor parallelism this is so even with ep=1, because each rank's experts see only its own tokens.
    """
    return layout.ep > 1 or layout.tp > 1


def _contiguous(world_size: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def _strided(world_size: int, stride: int) -> list[list[int]]:
    return [list(range(start, world_size, stride)) for start in range(stride)]


def plan_layout(cfg: RunConfig, world_size: int) -> Layout:
    """Return the layout of a run on world_size ranks. Raises ConfigError, with a remedy, if none fits."""
    layout = Layout(world_size, tp=cfg.parallel.tp, ep=cfg.parallel.ep)
    for name, reason in misfits(cfg.model, layout):
        fits = [
            size
            for size in divisors(world_size)
            if not any(n == name for n, _ in misfits(cfg.model, replace(layout, **{name: size})))
        ]
        raise ConfigError(f"parallel.{name}={getattr(layout, name)} {reason}; use one of {fits}")
    if cfg.parallel.sequence_parallel and layout.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true has no effect with parallel.tp=1; raise parallel.tp, or drop it"
        )
    if cfg.parallel.ep_chunks > 1 and layout.ep == 1:
        raise ConfigError(
            f"parallel.ep_chunks={cfg.parallel.ep_chunks} has no effect with parallel.ep=1, where ranks "
            "exchange no rows; raise parallel.ep, or drop it"
        )
    n_microbatches(cfg, layout)
    return layout


def misfits(model: ModelConfig, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield ("tp" or "ep", reason) for each reason why a layout does not fit a model."""
    for size_name in ("n_kv_heads", "vocab_size", "seq_len", "d_ff"):
        size = getattr(model, size_name)
        if size is not None and size % layout.tp:
            yield "tp", f"must divide model.{size_name}={size}"
    if model.d_shared % layout.tp:
        yield "tp", f"must divide model.n_shared_experts * model.d_expert = {model.d_shared}"
    if model.n_experts % layout.ep:
        yield "ep", f"must divide model.n_experts={model.n_experts}"
    n_groups = model.router.n_groups
    if layout.ep % n_groups and n_groups % layout.ep:
        # A token's experts are chosen from few groups so that its rows go to few ranks.
        yield (
            "ep",
            f"and model.router.n_groups={n_groups} must divide one another, or a group straddles ranks",
        )


def n_microbatches(cfg: RunConfig, layout: Layout) -> int:
    """Return how many micro-batches each rank accumulates per optimizer step.

    Raises ConfigError if the batch cannot be split like this.
    """
    seqs_at_once = layout.dp * cfg.train.microbatch_seqs  # on all ranks
    if cfg.batch_seqs % seqs_at_once:
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
    return cfg.batch_seqs // seqs_at_once


def name_ranks(ranks: list[int]) -> str:
    """Return "rank 3" or "ranks 3, 4"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
