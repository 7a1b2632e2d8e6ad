"""The weights of a trained model under Turnout's parameter names, from any source. One process, no engine.

They are read one tensor or one expert at a time, so that a model larger than memory can be copied.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder, build_decoder
from turnout.moe.parallel.sharding import is_expert
from turnout.training.checkpoint.directory import read_checkpoint
from turnout.training.checkpoint.manifest import BIAS, ROUTER_FILE
from turnout.training.checkpoint.resharding import Shard
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.config.optim import MASTER
from turnout.training.errors import CheckpointError

# Bytes read before the files are mapped again: mapped pages that were read count as the process's memory.
MAPPED_BYTES = 32 << 20


class Weights(Protocol):
    """A source of a model's weights.

    place           its directory, for messages
    tokenizer_path  its tokenizer.model or tokenizer.json
    """

    place: Path
    cfg: ModelConfig
    tokenizer_path: Path

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Return a parameter in its whole shape, or one expert's part, fp32 on the CPU.

        Raises CheckpointError.
        """
        ...

    def read_bias(self) -> Tensor:
        """Return the routers' bias, [n_moe_layers, n_experts] fp32. Raises CheckpointError."""
        ...


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each whole parameter by name."""
    with torch.device("meta"):
        decoder = Decoder(cfg)
    return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}


class CheckpointWeights:
    """The weights in a checkpoint saved by any layout. Its tensors are not verified here."""

    def __init__(self, directory: Path, cfg: ModelConfig) -> None:
        """Open a checkpoint. Raises CheckpointError if it is incomplete, or of another model than cfg's."""
        self.place, self.cfg = directory, cfg
        self.manifest = read_checkpoint(directory)
        self.shapes: Mapping[str, tuple[int, ...]] = parameter_shapes(cfg)
        found = {name: entry.shape for name, entry in self.manifest.tensors.items()}
        for name in sorted(found.keys() | self.shapes.keys()):
            if found.get(name) != self.shapes.get(name):
                here, there = self.shapes.get(name, "absent"), found.get(name, "absent")
                raise CheckpointError(f"{directory}: parameter {name} is {there}, but its config says {here}")
        names = [name for name in self.manifest.files if name.startswith("tokenizer.")]
        if len(names) != 1:
            raise CheckpointError(
                f"{directory}: holds {names or 'no tokenizer'}, but must hold one tokenizer"
            )
        self.tokenizer_path = directory / names[0]
        self._reader, self._n_mapped = TensorReader(directory, self.manifest), 0

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Return a parameter in its whole shape, or one expert's part, fp32 on the CPU."""
        shape, matrix = self.shapes[name], self.manifest.tensors[name].matrix
        first_col, width = 0, matrix.row_width
        if expert is not None:
            assert is_expert(name), "only experts are stacked"
            shape = shape[1:]
            first_col, width = expert * prod(shape), prod(shape)
        out = torch.empty(prod(shape))
        for start in range(0, out.numel(), MAPPED_BYTES // 4):
            stop = min(start + MAPPED_BYTES // 4, out.numel())
            self._limit_mapped()
            self._reader.read_shard(name, MASTER, Shard(first_col, width, start, stop), out[start:stop])
            self._n_mapped += 4 * (stop - start)
        return out.view(shape)

    def _limit_mapped(self) -> None:
        if self._n_mapped >= MAPPED_BYTES:
            self._reader, self._n_mapped = TensorReader(self.place, self.manifest), 0

    def read_bias(self) -> Tensor:
        """Return the routers' bias, [n_moe_layers, n_experts] fp32."""
        bias_ME = torch.empty(self.cfg.n_moe_layers, self.cfg.n_experts)
        self._reader.read_named(ROUTER_FILE, BIAS, bias_ME)
        return bias_ME


def load_decoder(
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    expert_backend: str = "reference",
) -> tuple[Decoder, RouterState]:
    """Return the whole model in eval mode on one device, with its router state."""
    decoder = build_decoder(weights.cfg, device=device, dtype=dtype, expert_backend=expert_backend)
    for name, parameter in decoder.named_parameters():
        read_into(weights, name, parameter)
    return decoder.eval(), read_router_state(weights, device)


@torch.no_grad()
def read_into(weights: Weights, name: str, out: Tensor) -> None:
    """Fill a tensor of the parameter's shape, any dtype and device. Experts are read one at a time."""
    parts = [out] if not is_expert(name) else list(out.unbind())
    for expert, part in enumerate(parts):
        part.copy_(weights.read(name, expert if is_expert(name) else None))


def read_router_state(weights: Weights, device: torch.device | str = "cpu") -> RouterState:
    """Return the trained bias with uniform load fractions, which only a training step reads."""
    state = RouterState.initial(weights.cfg, device)
    return RouterState(weights.read_bias().to(device), state.load_frac_ME)
