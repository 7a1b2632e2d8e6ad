"""One rank's part of a checkpoint: its fragments of the engine's state by name, for saving and restoring."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from turnout.moe.load_balancing import RouterState
from turnout.moe.parallel.sharding import Split, split_of
from turnout.training.checkpoint.manifest import BIAS, LOAD_FRAC, ROUTER_FILE
from turnout.training.checkpoint.resharding import Matrix, Shard
from turnout.training.checkpoint.tensor_files import TensorReader, key_of
from turnout.training.config.optim import MASTER
from turnout.training.engine.engine import Engine, Fragment
from turnout.training.errors import CheckpointError
from turnout.training.optimizers.adamw import ADAMW_KINDS, ADAMW_SCALARS
from turnout.training.parallel.groups import Groups

MODULE_PREFIX = "decoder."  # in parameter names of the engine's module (training/objective.py)


@dataclass(frozen=True)
class Placement:
    """The shape of a whole tensor, and which shard of it a fragment is."""

    shape: tuple[int, ...]
    matrix: Matrix
    shard: Shard


@dataclass(frozen=True)
class RankState:
    """One rank's part of a checkpoint.

    placements  by parameter name, the shard that this rank writes
    tensors     by key_of(kind, name), [numel of the shard] fp32
    router      by name, flat; the first rank writes them
    """

    kinds: tuple[str, ...]
    placements: Mapping[str, Placement]
    tensors: Mapping[str, Tensor]
    router: Mapping[str, Tensor]

    def copy_to_host(self, buffers: dict[str, Tensor]) -> "RankState":
        """Return a copy whose tensors are in host buffers.

        buffers: by key, [numel of the shard] fp32; filled here, and reused by the next copy.
        """
        for key, live in self.tensors.items():
            if key not in buffers or buffers[key].shape != live.shape:
                buffers[key] = torch.empty(live.shape, dtype=torch.float32, pin_memory=live.is_cuda)
            buffers[key].copy_(live, non_blocking=True)
        router = {name: live.flatten().to("cpu", copy=True) for name, live in self.router.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return replace(self, tensors={key: buffers[key] for key in self.tensors}, router=router)

    def to_plain_placements(self) -> dict[str, tuple[Any, ...]]:
        """Return the placements as plain integers for JSON: (shape, n_rows, row_width, shard) by name."""
        return {
            name: (
                placement.shape,
                placement.matrix.n_rows,
                placement.matrix.row_width,
                astuple(placement.shard),
            )
            for name, placement in self.placements.items()
        }


def rank_state_of(engine: Engine, router_state: RouterState, groups: Groups) -> RankState:
    """Return what this rank writes, in live tensors. Together the ranks write each element once."""
    layout = groups.layout
    names = [name for name, _ in engine.module.named_parameters()]
    placements: dict[str, Placement] = {}
    tensors: dict[str, Tensor] = {}
    for fragment in engine.fragments():
        # All tensor-parallel ranks hold the unsplit parameters, so these are spread over the ranks by index.
        is_replicated = split_of(fragment.name) is None
        if is_replicated and names.index(fragment.name) % layout.tp != layout.tp_rank(groups.rank):
            continue
        name = fragment.name.removeprefix(MODULE_PREFIX)
        placements[name] = placement_of(fragment, groups)
        tensors |= {key_of(kind, name): values for kind, values in fragment.values.items()}
    router = {BIAS: router_state.bias_ME, LOAD_FRAC: router_state.load_frac_ME}
    return RankState(engine.state_kinds(), placements, tensors, router)


def placement_of(fragment: Fragment, groups: Groups) -> Placement:
    """Return which shard of its whole tensor a rank's fragment is."""
    split = split_of(fragment.name)
    size, index = _part_of(split, groups)
    shape = _whole_shape(fragment.part_shape, split, size)
    matrix = Matrix.of(shape, split)
    width = matrix.row_width // size
    n = fragment.values[MASTER].numel()
    return Placement(shape, matrix, Shard(index * width, width, fragment.start, fragment.start + n))


def _part_of(split: Split | None, groups: Groups) -> tuple[int, int]:
    """Return the number of parts that a parameter is split into, and the index of this rank's part."""
    layout = groups.layout
    if split is None:
        return 1, 0
    return (
        (layout.tp, layout.tp_rank(groups.rank))
        if split.over == "tp"
        else (layout.ep, layout.ep_rank(groups.rank))
    )


def restore(reader: TensorReader, engine: Engine, router_state: RouterState, groups: Groups) -> RouterState:
    """Load a checkpoint, saved by any layout, into the engine; return the router state. Collective.

    router_state: any state of this model; only its shapes are used. Raises CheckpointError if the parameters
    of the checkpoint are not those of the model.
    """
    manifest = reader.manifest
    state = manifest.state
    check_parameters(reader, engine.module, groups)
    check_optimizer_state(reader)
    engine.make_optimizer_state(manifest.kinds, state.optimizer)
    for fragment in engine.fragments():
        name, placement = fragment.name.removeprefix(MODULE_PREFIX), placement_of(fragment, groups)
        for kind, values in fragment.values.items():
            reader.read_shard(name, kind, placement.shard, values)
    engine.adopt_masters()
    engine.restore_loss_scaler(state.loss_scaler)
    bias_ME, load_frac_ME = (
        torch.empty_like(router_state.bias_ME),
        torch.empty_like(router_state.load_frac_ME),
    )
    reader.read_named(ROUTER_FILE, BIAS, bias_ME)
    reader.read_named(ROUTER_FILE, LOAD_FRAC, load_frac_ME)
    return RouterState(bias_ME, load_frac_ME)


def check_parameters(reader: TensorReader, module: nn.Module, groups: Groups) -> None:
    """Compare names and shapes of all parameters. Raises CheckpointError naming the first that differs."""
    wanted = dict(_whole_matrices(module, groups))
    found = {name: (entry.shape, entry.matrix) for name, entry in reader.manifest.tensors.items()}
    if wanted == found:
        return
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = (x[name][0] if name in x else "absent" for x in (wanted, found))
            raise CheckpointError(
                f"{reader.directory}: parameter {name} is {there}, but this model's is {here}"
            )


def check_optimizer_state(reader: TensorReader) -> None:
    """Check the optimizer state. Raises CheckpointError unless it is AdamW's, or empty before any update."""
    kinds, scalars = {*reader.manifest.kinds} - {MASTER}, {*reader.manifest.state.optimizer}
    if (kinds, scalars) not in ((set(), set()), ({*ADAMW_KINDS}, {*ADAMW_SCALARS})):
        raise CheckpointError(
            f"{reader.directory}: holds {sorted(kinds | scalars)}, but AdamW keeps "
            f"{sorted({*ADAMW_KINDS, *ADAMW_SCALARS})}"
        )


def _whole_matrices(
    module: nn.Module, groups: Groups
) -> Iterator[tuple[str, tuple[tuple[int, ...], Matrix]]]:
    for name, parameter in module.named_parameters():
        split = split_of(name)
        shape = _whole_shape(parameter.shape, split, _part_of(split, groups)[0])
        yield name.removeprefix(MODULE_PREFIX), (shape, Matrix.of(shape, split))


def _whole_shape(part_shape: Sequence[int], split: Split | None, n_parts: int) -> tuple[int, ...]:
    return tuple(n * n_parts if split and dim == split.dim else n for dim, n in enumerate(part_shape))
