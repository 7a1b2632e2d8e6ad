"""Load a model larger than one device: accelerate spreads its blocks over GPUs, host memory and disk.

A block that is not on the device that computes (a GPU, or the CPU if there is none) is copied there for its
own pass and dropped again. The embedding, the last norm and the head stay on the first device, because every
token needs them. Weights are read and placed one tensor at a time, so no memory ever holds the whole model.
"""

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory, offload_weight, save_offload_index, set_module_tensor_to_device
from torch import nn

from turnout.moe.kv_cache import CachedBlock, CachedDecoder
from turnout.moe.model import build_decoder
from turnout.training.checkpoint.weights import Weights, read_into, read_router_state
from turnout.training.errors import ConfigError

# Fraction of the free memory: the rest is for the cache, activations and other programs.
USED_FRAC = 0.9
DISK = "disk"
Device = int | str
MIB = 2**20


def load_spread(
    weights: Weights, *, max_bytes: int | None, offload_dir: Path, dtype: torch.dtype, expert_backend: str
) -> tuple[CachedDecoder, str]:
    """Return the model with its blocks spread over the devices, and a sentence on where they are.

    max_bytes    limit for the weights on each GPU, or in memory if there is none; None: USED_FRAC of the free
    offload_dir  an empty directory for the blocks on disk; keep it as long as the model is used
    Raises ConfigError if memory or disk is too small.
    """
    decoder = build_decoder(weights.cfg, device="meta", dtype=dtype, expert_backend=expert_backend)
    model = CachedDecoder(decoder.eval(), read_router_state(weights)).requires_grad_(False)
    limits = _limits(max_bytes)
    main = next(iter(limits))
    places = _place_blocks(model, limits, main)
    sizes = {f"blocks.{i}": _n_bytes(block) for i, block in enumerate(model.blocks)}
    _check_disk(offload_dir, sum(sizes[name] for name, place in places.items() if place == DISK))
    index: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=dtype)
        read_into(weights, name, value)
        place = places.get(".".join(name.split(".")[:2]), main)
        if place == DISK:
            index = offload_weight(value, name, offload_dir, index)
        else:
            set_module_tensor_to_device(model, name, place, value=value)
    save_offload_index(index, offload_dir)
    ends = {name: main for name, child in model.named_children() if name != "blocks"}
    # accelerate would warn that parameters are not in memory, which is intended here.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    dispatch_model(
        model,
        {**ends, **places},
        main_device=main,  # given a torch.device, accelerate would treat blocks on "cpu" as offloaded
        offload_dir=offload_dir,
        preload_module_classes=[CachedBlock.__name__],
        force_hooks=True,
    )
    model.bias_ME = model.bias_ME.to(main)
    return model, _describe(places, sizes, offload_dir)


def _limits(max_bytes: int | None) -> dict[Device, int]:
    """Return how many bytes of weights each device may hold, the first device first."""
    free = {device: int(USED_FRAC * n_bytes) for device, n_bytes in get_max_memory().items()}
    if max_bytes is None:
        return free
    gpus = {device: max_bytes for device in free if device != "cpu"}
    return {**gpus, "cpu": free["cpu"]} if gpus else {"cpu": max_bytes}


def _place_blocks(model: CachedDecoder, limits: dict[Device, int], main: Device) -> dict[str, Device]:
    """Return the device of each block by name.

    On the main device room for one block is kept free, through which the offloaded blocks pass.
    """
    blocks = [_n_bytes(block) for block in model.blocks]
    n_ends = _n_bytes(model) - sum(blocks)
    if limits[main] < n_ends + max(blocks):
        raise ConfigError(
            f"a limit of {limits[main] / MIB:,.2f} MiB on {_name(main)} is below what must be there at once: "
            f"embedding, norm and head {n_ends / MIB:,.2f} MiB, and a block {max(blocks) / MIB:,.2f} MiB; "
            "raise --max-memory, or leave it out"
        )
    left = {**limits, main: limits[main] - n_ends}
    if sum(blocks) <= left[main]:
        return {f"blocks.{i}": main for i in range(len(blocks))}
    placed = infer_auto_device_map(
        model.blocks, max_memory=left, no_split_module_classes=[CachedBlock.__name__], clean_result=False
    )
    return {f"blocks.{name}": place for name, place in placed.items()}


def _n_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _check_disk(offload_dir: Path, n_needed: int) -> None:
    # Checked in advance, because writing goes through a mapped file: a full disk would kill the process.
    n_free = shutil.disk_usage(offload_dir).free
    if n_needed > n_free:
        raise ConfigError(
            f"{n_needed / MIB:,.0f} MiB of the model would go to {offload_dir}, which has "
            f"{n_free / MIB:,.0f} MiB free; raise --max-memory, or set TMPDIR to a larger disk"
        )


def _name(place: Device) -> str:
    return f"cuda:{place}" if isinstance(place, int) else "the CPU" if place == "cpu" else place


def _describe(places: dict[str, Device], sizes: dict[str, int], offload_dir: Path) -> str:
    n_blocks = Counter(places.values())
    n_bytes = {place: sum(sizes[name] for name, at in places.items() if at == place) for place in n_blocks}
    parts = [f"{n} on {_name(place)} ({n_bytes[place] / MIB:,.0f} MiB)" for place, n in n_blocks.items()]
    where = f", in {offload_dir}" if DISK in n_blocks else ""
    return f"blocks: {', '.join(parts)}{where}"
