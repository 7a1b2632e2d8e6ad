"""Which dimension of each parameter is split over which group: the one table that building, initialising, the
engine and checkpoints read.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor  # importing torch would delay commands that only read checkpoints


@dataclass(frozen=True)
class Split:
    """A parameter is cut along `dim` into equal parts, one for each rank of the group."""

    over: Literal["tp", "ep"]
    dim: int


# Endings of the names of split parameters; every other parameter is held whole by every rank.
_SPLITS = {
    "embed.weight": Split("tp", 0),
    "head.weight": Split("tp", 0),
    "attn.q.weight": Split("tp", 0),
    "attn.k.weight": Split("tp", 0),
    "attn.v.weight": Split("tp", 0),
    "attn.o.weight": Split("tp", 1),
    "gate.weight": Split("tp", 0),
    "up.weight": Split("tp", 0),
    "down.weight": Split("tp", 1),
    "experts.gate_up": Split("ep", 0),
    "experts.down": Split("ep", 0),
}


def split_of(name: str) -> Split | None:
    """Return how the parameter of this (global) name is split; None: it is not."""
    return next(
        (split for ending, split in _SPLITS.items() if name.endswith(f".{ending}")), None
    ) or _SPLITS.get(name)


def is_expert(name: str) -> bool:
    """Return whether the parameter belongs to the routed experts."""
    split = split_of(name)
    return split is not None and split.over == "ep"


def own_part(whole: "Tensor", split: Split | None, size: int, rank: int) -> "Tensor":
    """Return a rank's part of a whole tensor [...]: 1 / size of dim split.dim, or all if split is None."""
    return whole if split is None else whole.chunk(size, split.dim)[rank]
