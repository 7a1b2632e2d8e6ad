"""A Hugging Face directory read back without its client: what no tried token touches must be right, too.

Shares with the writer the table of names, which the client proves: a wrong name is a tensor missing there.
"""

from pathlib import Path

import torch
from torch import Tensor

from turnout.moe.config import BalanceConfig
from turnout.moe.parallel.sharding import is_expert
from turnout.training.checkpoint.weights import Weights, parameter_shapes
from turnout.training.errors import CheckpointError, ConfigError, ExportError
from turnout.training.export.reader import HfWeights


def check_huggingface(directory: Path, weights: Weights) -> str:
    """Compare every number and the config of a directory with weights rounded as it is; say so in words.

    One tensor of each side is in memory at a time, an expert being one. Raises ExportError.
    """
    try:
        found = HfWeights(directory)
        _check_config(found, weights)
        names = list(parameter_shapes(weights.cfg))
        for name in names:
            for expert in range(weights.cfg.n_experts) if is_expert(name) else (None,):
                if not _same_bits(_read(found, name, expert), weights.read(name, expert)):
                    part = name if expert is None else f"{name} of expert {expert}"
                    raise ExportError(f"{part} was written with other numbers; nothing was kept")
        # As numbers: a bias of -0.0, which is none, reads as 0.0 where the architecture has no bias.
        if not torch.equal(found.read_bias(), weights.read_bias()):
            raise ExportError("the routers' bias was written with other numbers; nothing was kept")
    except (CheckpointError, ConfigError) as err:
        raise ExportError(f"what was written cannot be read back: {err}; nothing was kept") from err
    return f"read back: all {len(names)} parameters are those of the model, bit for bit as they were rounded"


def _check_config(found: HfWeights, weights: Weights) -> None:
    # A head like the embedding reads as a tied one, and a shared expert of zeros as none: then the numbers
    # that are compared next say whether they were.
    have, want = found.cfg.model_dump(), weights.cfg.model_dump()
    want["balance"] = BalanceConfig().model_dump()
    want["tie_embeddings"] |= have["tie_embeddings"]
    if have["n_shared_experts"] == 0 and want["n_shared_experts"] == 1:
        want["n_shared_experts"] = 0
    for name, value in want.items():
        if have[name] != value:
            raise ExportError(
                f"config.json reads as model.{name}={have[name]} where the model has {value}; nothing was "
                "kept"
            )


def _read(found: HfWeights, name: str, expert: int | None) -> Tensor:
    if name == "head.weight" and found.cfg.tie_embeddings:
        name = "embed.weight"
    if ".moe.shared." in name and not found.cfg.n_shared_experts:
        return torch.zeros(())
    return found.read(name, expert)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.expand_as(other).contiguous().view(torch.int32), other.view(torch.int32))
