"""A safetensors file as a stream of bytes, so that no whole tensor needs to be in memory.

Format: github.com/huggingface/safetensors, "Format".
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from turnout.training.checkpoint.durable_io import Buffer

Item = TypeVar("Item")
CHUNK_BYTES = 16 << 20
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its shape and dtype for the header, and a function that reads its elements.

    read  called once, just before the tensor is written. Returns contiguous CPU tensors of any shape; their
          elements in order are those of the whole tensor, row-major.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterable[Tensor]]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def cut_by_bytes(
    items: Iterable[Item], n_bytes_of: Callable[[Item], int], max_bytes: int
) -> Iterator[list[Item]]:
    """Distribute items over files of at most max_bytes each; a larger item gets a file of its own."""
    part, n_bytes = list[Item](), 0
    for item in items:
        if part and n_bytes + n_bytes_of(item) > max_bytes:
            yield part
            part, n_bytes = [], 0
        part.append(item)
        n_bytes += n_bytes_of(item)
    yield part


def safetensors_chunks(
    tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> Iterator[Buffer]:
    """Yield the header, then the tensors in its order. Each is read after the ones before it were written."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, stored in tensors.items():
        begin, end = end, end + stored.n_bytes
        shape, dtype = list(stored.shape), DTYPE_NAMES[stored.dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for stored in tensors.values():
        yield from _bytes_of(stored)


def _bytes_of(stored: Stored) -> Iterable[Buffer]:
    n_read = 0
    for part in stored.read():
        assert part.is_contiguous() and part.device.type == "cpu"
        n_read += part.numel()
        # Converted chunk by chunk: as bf16, a converted copy of the whole part would add half its size.
        for chunk in part.flatten().split(CHUNK_BYTES // part.element_size()):
            yield memoryview(chunk.to(stored.dtype).view(torch.uint8).numpy().data)
        del part, chunk  # before the next part is read
    assert n_read == prod(stored.shape), "the parts do not add up to the tensor"
