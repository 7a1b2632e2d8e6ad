"""The bytes that one rank holds of a run's training state, and the most that a step takes.

Contract: `state_bytes` is exact: a test finds every tensor that the engine keeps, and counts the same. It
follows how DeepSpeed lays out parameters, which training/engine/deepspeed_config.py fixes. What it holds while it
reduces gradients is the sum of its large buffers. Activations are in launch/estimate/activations.py; checkpoints,
evaluation and what libraries keep for themselves are not counted.
"""

from dataclasses import dataclass
from functools import cache

from accelerate import init_empty_weights
from torch import nn

from turnout.moe.config import ModelConfig
from turnout.moe.model import Decoder
from turnout.moe.parallel.sharding import is_expert, split_of
from turnout.training.config.run import RunConfig
from turnout.training.engine.deepspeed_config import BUCKET_ELEMENTS
from turnout.training.optimizers.adamw import ADAMW_KINDS, ADAMW_SCALARS, param_groups
from turnout.training.parallel.layout import Layout, has_own_expert_groups, n_microbatches

FP32_BYTES = 4
# DeepSpeed pads each group of parameters to a multiple of this times the ranks that share it.
ALIGNMENT = 2


@dataclass(frozen=True)
class StateBytes:
    """Bytes one rank holds of the training state, without activations.

    gradients: the most that is kept from one micro-batch to the next, or to the update.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that DeepSpeed lays end to end in one buffer, of which each rank updates an equal share.

    sizes: elements of each parameter on this rank, in their order
    n_shares, share_idx: how many ranks hold the same parameters, and which of them this one is
    """

    sizes: tuple[int, ...]
    n_shares: int
    share_idx: int

    @property
    def n_padded(self) -> int:
        unit = ALIGNMENT * self.n_shares
        return -(-sum(self.sizes) // unit) * unit

    @property
    def n_share(self) -> int:
        return self.n_padded // self.n_shares

    @property
    def n_touched(self) -> int:
        """Elements of the parameters of which any part is in this rank's share."""
        start, n_touched = self.share_idx * self.n_share, 0
        place = 0
        for size in self.sizes:
            if place < start + self.n_share and place + size > start:
                n_touched += size
            place += size
        return n_touched

    @property
    def n_filling(self) -> int:
        """Elements of this rank's share that are padding."""
        end = (self.share_idx + 1) * self.n_share
        return min(self.n_share, max(0, end - sum(self.sizes)))


def rank_params(cfg: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Return how many parameters one rank holds: dense ones and those of routed experts."""
    dense = experts = 0
    for name, parameter in _parameters(cfg):
        if is_expert(name):
            experts += _n_own(name, parameter, layout)
        else:
            dense += _n_own(name, parameter, layout)
    return dense, experts


def flat_groups(cfg: RunConfig, layout: Layout, rank: int) -> list[FlatGroup]:
    """Return the buffers in which DeepSpeed keeps a rank's parameters: those with weight decay and those
    without, and experts apart where they are reduced over other ranks.
    """
    named = _parameters(cfg.model)
    names = {id(parameter): name for name, parameter in named}
    groups = []
    for group in param_groups(named, cfg.optim.weight_decay):
        together, apart = list[int](), list[int]()
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_apart = has_own_expert_groups(layout) and is_expert(name)
            (apart if is_apart else together).append(_n_own(name, parameter, layout))
        groups.append(FlatGroup(tuple(together), layout.dp, layout.dp_rank(rank)))
        if apart:
            groups.append(FlatGroup(tuple(apart), layout.edp, layout.edp_rank(rank)))
    return groups


@cache
def _parameters(cfg: ModelConfig) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the whole decoder by name, without memory for them."""
    with init_empty_weights():
        return list(Decoder(cfg).named_parameters())


def _n_own(name: str, parameter: nn.Parameter, layout: Layout) -> int:
    split = split_of(name)
    n_parts = 1 if split is None else {"tp": layout.tp, "ep": layout.ep}[split.over]
    return parameter.numel() // n_parts


def state_bytes(cfg: RunConfig, layout: Layout, rank: int = 0) -> StateBytes:
    """Return a rank's bytes under ZeRO (Rajbhandari et al. 2020, section 3).

    AdamW's two moments and the fp32 master are split over the ranks that hold the same weights, the padding
    of each group too. AdamW counts each group's steps in a tensor of its own.
    """
    groups = flat_groups(cfg, layout, rank)
    n_share, n_padded = sum(g.n_share for g in groups), sum(g.n_padded for g in groups)
    per_element = 1 + len(ADAMW_KINDS)  # the master
    return StateBytes(
        weights=weight_bytes(cfg) * n_padded,
        gradients=_gradient_bytes(cfg, groups),
        optimizer=FP32_BYTES * (per_element * n_share + len(ADAMW_SCALARS) * len(groups)),
    )


def weight_bytes(cfg: RunConfig) -> int:
    """Return the bytes of one weight."""
    return FP32_BYTES if cfg.train.precision == "fp32" else 2


def largest_state(cfg: RunConfig, layout: Layout) -> StateBytes:
    """Return what the rank holds that holds most."""
    states = (state_bytes(cfg, layout, rank) for rank in range(layout.world_size))
    return max(states, key=lambda state: state.total)


def largest_peak(cfg: RunConfig, layout: Layout, activations: int) -> int:
    """Return the peak of the rank whose is the highest, which need not be the one with most state."""
    return max(peak_bytes(cfg, layout, rank, activations) for rank in range(layout.world_size))


def peak_bytes(cfg: RunConfig, layout: Layout, rank: int, activations: int) -> int:
    """Return the most that a rank holds at once in a step, of what is in use.

    activations: what the passes of one micro-batch add. They are gone when the last gradients are reduced.
    """
    groups, state = flat_groups(cfg, layout, rank), state_bytes(cfg, layout, rank)
    held = state.gradients if n_microbatches(cfg, layout) > 1 else 0
    if not held and _has_bf16_optimizer(cfg):
        held = FP32_BYTES * sum(g.n_padded for g in groups)
    return state.weights + state.optimizer + max(held + activations, _reducing_bytes(cfg, layout, groups))


def bucket_bytes(cfg: RunConfig) -> int:
    """Return what DeepSpeed reserves to reduce gradients in; of a CPU's memory it takes what they fill."""
    if _has_bf16_optimizer(cfg):
        return 0
    return (FP32_BYTES if cfg.parallel.zero_stage == 1 else weight_bytes(cfg)) * BUCKET_ELEMENTS


def _has_bf16_optimizer(cfg: RunConfig) -> bool:
    """Return whether DeepSpeed takes its bf16 optimizer, which has buffers of its own, and no bucket."""
    return cfg.train.precision == "bf16" and cfg.parallel.zero_stage == 1


def _gradient_bytes(cfg: RunConfig, groups: list[FlatGroup]) -> int:
    n = sum(sum(g.sizes) for g in groups)
    if _has_bf16_optimizer(cfg):
        # All bf16 gradients, and their fp32 sum, which is padded as the weights are.
        return weight_bytes(cfg) * n + FP32_BYTES * sum(g.n_padded for g in groups)
    # ZeRO-1 reduces after the last micro-batch, and before keeps the sum of all, in fp32.
    reduced = _reduced_bytes(cfg, groups)
    return reduced if cfg.parallel.zero_stage == 2 else max(FP32_BYTES * n, reduced)


def _reduced_bytes(cfg: RunConfig, groups: list[FlatGroup]) -> int:
    if cfg.train.precision == "fp32":
        # A gradient is kept whole where any of it is in this rank's share.
        return FP32_BYTES * sum(g.n_touched + g.n_filling for g in groups)
    return FP32_BYTES * sum(g.n_share for g in groups)


def _reducing_bytes(cfg: RunConfig, layout: Layout, groups: list[FlatGroup]) -> int:
    """Return the most that gradients take while they are reduced, copies of them included."""
    n = sum(sum(g.sizes) for g in groups)
    n_at_once, reduced = min(n, BUCKET_ELEMENTS), _reduced_bytes(cfg, groups)
    if _has_bf16_optimizer(cfg):
        return _gradient_bytes(cfg, groups) + FP32_BYTES * n_at_once  # laid end to end
    if cfg.parallel.zero_stage == 1:
        gradients = FP32_BYTES * n  # in the bucket, and those that are not there yet
        copy = FP32_BYTES * n_at_once
    else:
        held = reduced if n_microbatches(cfg, layout) > 1 and cfg.train.precision == "fp32" else 0
        gradients = held + weight_bytes(cfg) * n_at_once
        # In half precision once as it is, and once in fp32.
        copy = (weight_bytes(cfg) + FP32_BYTES if cfg.train.precision != "fp32" else FP32_BYTES) * n_at_once
    if cfg.train.precision != "fp32":
        return gradients + copy + reduced  # added to the shares from the copy
    # The bucket is copied where it is cut into shares; what is kept is copied once that copy is gone.
    return gradients + max(copy if layout.dp > 1 else 0, reduced)
