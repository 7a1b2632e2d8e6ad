"""The bytes of training state that one rank holds, and the peak of a step.

Contract: `state_bytes` is exact: a test finds every tensor that the engine keeps, and counts the same. It
follows DeepSpeed's layout of parameters, which training/engine/deepspeed_config.py fixes. The estimate for
gradient reduction is the sum of DeepSpeed's large buffers. Activations are estimated in
launch/estimate/activations.py. Not counted: checkpoints, evaluation, and what libraries keep for themselves.
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
# DeepSpeed pads each group of parameters to a multiple of this times the ranks that it is partitioned over.
ALIGNMENT = 2


@dataclass(frozen=True)
class StateBytes:
    """Bytes of training state that one rank holds, without activations.

    gradients: the most that stays from one micro-batch to the next, or until the update.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that DeepSpeed lays end to end in one buffer; each rank updates an equal partition of it.

    sizes: elements of each parameter on this rank, in their order
    n_partitions, partition_idx: how many ranks hold the same parameters, and which of them this one is
    """

    sizes: tuple[int, ...]
    n_partitions: int
    partition_idx: int

    @property
    def n_padded(self) -> int:
        unit = ALIGNMENT * self.n_partitions
        return -(-sum(self.sizes) // unit) * unit

    @property
    def n_in_partition(self) -> int:
        return self.n_padded // self.n_partitions

    @property
    def n_overlapping(self) -> int:
        """Elements of all parameters that overlap this rank's partition, counted whole."""
        begin = self.partition_idx * self.n_in_partition
        first = n_overlapping = 0
        for size in self.sizes:
            if first < begin + self.n_in_partition and first + size > begin:
                n_overlapping += size
            first += size
        return n_overlapping

    @property
    def n_padding(self) -> int:
        """Elements of this rank's partition that are padding."""
        end = (self.partition_idx + 1) * self.n_in_partition
        return min(self.n_in_partition, max(0, end - sum(self.sizes)))


def flat_groups(cfg: RunConfig, layout: Layout, rank: int) -> list[FlatGroup]:
    """Return the buffers in which DeepSpeed keeps a rank's parameters.

    One holds the parameters with weight decay, one those without. Experts have buffers of their own where
    their gradients are reduced over other ranks.
    """
    named = _parameters(cfg.model)
    names = {id(parameter): name for name, parameter in named}
    groups = []
    for group in param_groups(named, cfg.optim.weight_decay):
        common, separate = list[int](), list[int]()
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_separate = has_own_expert_groups(layout) and is_expert(name)
            (separate if is_separate else common).append(_n_own(name, parameter, layout))
        groups.append(FlatGroup(tuple(common), layout.dp, layout.dp_rank(rank)))
        if separate:
            groups.append(FlatGroup(tuple(separate), layout.edp, layout.edp_rank(rank)))
    return groups


@cache
def _parameters(cfg: ModelConfig) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the whole decoder by name, without memory for their values."""
    with init_empty_weights():
        return list(Decoder(cfg).named_parameters())


def _n_own(name: str, parameter: nn.Parameter, layout: Layout) -> int:
    split = split_of(name)
    n_parts = 1 if split is None else {"tp": layout.tp, "ep": layout.ep}[split.over]
    return parameter.numel() // n_parts


def state_bytes(cfg: RunConfig, layout: Layout, rank: int = 0) -> StateBytes:
    """Return a rank's bytes under ZeRO (Rajbhandari et al. 2020, section 3).

    AdamW's two moments and the fp32 master weights, with the padding of each group, are partitioned over the
    ranks that hold the same weights. AdamW keeps a tensor that counts the steps of each group.
    """
    groups = flat_groups(cfg, layout, rank)
    n_in_partition, n_padded = sum(g.n_in_partition for g in groups), sum(g.n_padded for g in groups)
    per_element = 1 + len(ADAMW_KINDS)  # 1: the master weight
    return StateBytes(
        weights=weight_bytes(cfg) * n_padded,
        gradients=_gradient_bytes(cfg, groups),
        optimizer=FP32_BYTES * (per_element * n_in_partition + len(ADAMW_SCALARS) * len(groups)),
    )


def weight_bytes(cfg: RunConfig) -> int:
    """Return the bytes of one weight."""
    return FP32_BYTES if cfg.train.precision == "fp32" else 2


def largest_state(cfg: RunConfig, layout: Layout) -> StateBytes:
    """Return the state of the rank that holds most."""
    states = (state_bytes(cfg, layout, rank) for rank in range(layout.world_size))
    return max(states, key=lambda state: state.total)


def largest_peak(cfg: RunConfig, layout: Layout, activations: int) -> int:
    """Return the highest peak of all ranks; the rank with the most state need not have it."""
    return max(peak_bytes(cfg, layout, rank, activations) for rank in range(layout.world_size))


def peak_bytes(cfg: RunConfig, layout: Layout, rank: int, activations: int) -> int:
    """Return the most bytes that a rank has in use at once in a step.

    activations: bytes that the passes of one micro-batch add. They are freed before the last gradients are
    reduced.
    """
    groups, state = flat_groups(cfg, layout, rank), state_bytes(cfg, layout, rank)
    held = state.gradients if n_microbatches(cfg, layout) > 1 else 0
    if not held and _has_bf16_optimizer(cfg):
        held = FP32_BYTES * sum(g.n_padded for g in groups)
    return state.weights + state.optimizer + max(held + activations, _reducing_bytes(cfg, layout, groups))


def bucket_bytes(cfg: RunConfig) -> int:
    """Return the bytes that DeepSpeed reserves for its gradient bucket. CPUs back only the filled part."""
    if _has_bf16_optimizer(cfg):
        return 0
    return (FP32_BYTES if cfg.parallel.zero_stage == 1 else weight_bytes(cfg)) * BUCKET_ELEMENTS


def _has_bf16_optimizer(cfg: RunConfig) -> bool:
    """Return whether DeepSpeed uses its bf16 optimizer, which has buffers of its own and no bucket."""
    return cfg.train.precision == "bf16" and cfg.parallel.zero_stage == 1


def _gradient_bytes(cfg: RunConfig, groups: list[FlatGroup]) -> int:
    n = sum(sum(g.sizes) for g in groups)
    if _has_bf16_optimizer(cfg):
        # All bf16 gradients, and their fp32 sum, which is padded as the weights are.
        return weight_bytes(cfg) * n + FP32_BYTES * sum(g.n_padded for g in groups)
    # ZeRO-1 reduces after the last micro-batch, and until then keeps the fp32 sum of all gradients.
    reduced = _reduced_bytes(cfg, groups)
    return reduced if cfg.parallel.zero_stage == 2 else max(FP32_BYTES * n, reduced)


def _reduced_bytes(cfg: RunConfig, groups: list[FlatGroup]) -> int:
    if cfg.train.precision == "fp32":
        # A gradient is kept whole if any part of it is in this rank's partition.
        return FP32_BYTES * sum(g.n_overlapping + g.n_padding for g in groups)
    return FP32_BYTES * sum(g.n_in_partition for g in groups)


def _reducing_bytes(cfg: RunConfig, layout: Layout, groups: list[FlatGroup]) -> int:
    """Return the most bytes that gradients and their copies take while they are reduced."""
    n = sum(sum(g.sizes) for g in groups)
    n_at_once, reduced = min(n, BUCKET_ELEMENTS), _reduced_bytes(cfg, groups)
    if _has_bf16_optimizer(cfg):
        return _gradient_bytes(cfg, groups) + FP32_BYTES * n_at_once  # laid end to end
    if cfg.parallel.zero_stage == 1:
        gradients = FP32_BYTES * n  # in the bucket, or still to be copied into it
        copy = FP32_BYTES * n_at_once
    else:
        held = reduced if n_microbatches(cfg, layout) > 1 and cfg.train.precision == "fp32" else 0
        gradients = held + weight_bytes(cfg) * n_at_once
        # In half precision there are two copies: one in the gradient's own type, one in fp32.
        copy = (weight_bytes(cfg) + FP32_BYTES if cfg.train.precision != "fp32" else FP32_BYTES) * n_at_once
    if cfg.train.precision != "fp32":
        return gradients + copy + reduced  # the partition's fp32 sums are added up from the copy
    # The bucket is copied to be cut into partitions. The kept gradients are copied after that copy is freed.
    return gradients + max(copy if layout.dp > 1 else 0, reduced)
