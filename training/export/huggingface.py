"""A model of ours as a Hugging Face directory, written from any weights one tensor at a time.

    config.json, generation_config.json             ours, read by transformers 4 and 5
    model-00001-of-00002.safetensors .., index      per-expert tensors
    tokenizer.model, tokenizer.json, tokenizer_config.json

Memory is the largest tensor, an expert of a layer being one, and some MiB.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.data.tokenizer import load_tokenizer
from turnout.training.checkpoint.durable_io import Buffer, Disk
from turnout.training.checkpoint.safetensors_stream import Stored, cut_by_bytes, safetensors_chunks
from turnout.training.checkpoint.weights import Weights
from turnout.training.export.architectures import to_hf_config
from turnout.training.export.hf_files import CONFIG, INDEX
from turnout.training.export.naming import Architecture, Slot, half_of, slots
from turnout.training.export.tokenizer_files import write_tokenizer

MAX_SHARD_BYTES = 5 * 10**9
GENERATION_CONFIG = "generation_config.json"


def write_huggingface(
    weights: Weights,
    architecture: Architecture,
    directory: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Fill an empty directory. Raises CheckpointError, ConfigError (tokenizer) or OSError.

    dtype: float32 or bfloat16, of everything but the routers' bias, which stays fp32 as its readers keep it.
    on_written: is told of bytes as they are written.
    """
    disk, cfg = Disk(), weights.cfg
    tokenizer = load_tokenizer(weights.tokenizer_path)
    write_tokenizer(weights.tokenizer_path, directory, seq_len=cfg.seq_len)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = to_hf_config(
        architecture, cfg, dtype=dtype_words(dtype), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    write_json(disk, directory / CONFIG, config)
    write_json(disk, directory / GENERATION_CONFIG, {**ids, "pad_token_id": tokenizer.eos_id})
    shards = list(cut_by_bytes(slots(architecture, cfg), partial(_n_bytes, dtype), max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {
            slot.name: Stored(slot.shape, dtype_of(slot, dtype), partial(_read_parts, weights, slot))
            for slot in shard
        }
        chunks = safetensors_chunks(stored, {"format": "pt"})
        disk.write(directory / file, counted(chunks, on_written))
        weight_map |= dict.fromkeys(stored, file)
    total = sum(_n_bytes(dtype, slot) for shard in shards for slot in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(disk, directory / INDEX, index)


def _read_parts(weights: Weights, slot: Slot) -> Iterator[Tensor]:
    yield read_slot(weights, slot)


def read_slot(weights: Weights, slot: Slot) -> Tensor:
    """Return what fills a slot, fp32."""
    if slot.kind == "parameter":
        values = weights.read(slot.ours, slot.index)
        return values if slot.half is None else half_of(values, slot.half).contiguous()
    if slot.kind == "bias":
        assert slot.index is not None
        return weights.read_bias()[slot.index]
    return torch.zeros(slot.shape)


def dtype_of(slot: Slot, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a slot is stored."""
    return torch.float32 if slot.kind == "bias" else dtype


def dtype_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def total_bytes(architecture: Architecture, weights: Weights, dtype: torch.dtype) -> int:
    """Return the bytes of all tensors."""
    return sum(_n_bytes(dtype, slot) for slot in slots(architecture, weights.cfg))


def counted(chunks: Iterable[Buffer], on_written: Callable[[int], None] | None) -> Iterator[Buffer]:
    """Yield chunks, and tell of each after it was written."""
    for chunk in chunks:
        yield chunk
        if on_written is not None:
            on_written(len(chunk))


def write_json(disk: Disk, path: Path, tree: dict[str, Any]) -> None:
    disk.write(path, [(json.dumps(tree, indent=2) + "\n").encode()])


def _n_bytes(dtype: torch.dtype, slot: Slot) -> int:
    return prod(slot.shape) * dtype_of(slot, dtype).itemsize
