"""The memory of writing exports and an import, over the largest tensor: `python -m tests.bench export-memory`
makes a checkpoint of 2 GB and measures each in a process of its own.
"""

import tempfile
import time
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.rows import Row
from tests.bench.side_by_side import GLIBC_DEFAULTS, MIB, in_own_process, peak_extra_bytes
from tests.exports import save_weights
from tests.models import tiny_config
from tests.unit.data_fixtures import write_tokenizer
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.manifest import Attached, DataIdentity
from turnout.training.checkpoint.weights import CheckpointWeights, parameter_shapes
from turnout.training.export.gguf_file import KINDS, write_gguf
from turnout.training.export.huggingface import write_huggingface
from turnout.training.export.reader import HfWeights
from turnout.training.export.to_checkpoint import write_first_checkpoint

FORMS = ("hf float32", "hf bfloat16", "gguf float32", "gguf q8_0", "import")
# Needed for any model: 32 MiB of a mapped file, chunks of 16 MiB, and heap that they leave behind.
CONSTANT_BYTES = 128 * MIB
LARGE = {"n_layers": 6, "d_model": 1024, "n_heads": 8, "n_kv_heads": 4, "d_head": 128, "vocab_size": 64_000}
LARGE |= {"n_experts": 12, "d_expert": 2048, "seq_len": 64}
SMALL = {**LARGE, "n_layers": 3, "d_model": 512, "d_expert": 1024}
# Nearly all weights are the experts of one layer.
MANY = {**LARGE, "n_layers": 1, "d_model": 512, "vocab_size": 300, "n_experts": 120, "d_expert": 1024}


class SyntheticWeights:
    """Weights whose values are made when they are read, so that they take no memory before."""

    def __init__(self, cfg: ModelConfig, tokenizer_path: Path) -> None:
        self.place, self.cfg, self.tokenizer_path = Path("memory"), cfg, tokenizer_path
        self._shapes = parameter_shapes(cfg)

    def read(self, name: str, expert: int | None = None) -> Tensor:
        shape = self._shapes[name] if expert is None else self._shapes[name][1:]
        return torch.linspace(-1, 1, prod(shape)).view(shape)

    def read_bias(self) -> Tensor:
        return torch.zeros(self.cfg.n_moe_layers, self.cfg.n_experts)


def save_synthetic(place: Path, sizes: dict[str, int]) -> Path:
    """Write a checkpoint of these sizes, and a Hugging Face directory beside it for `import`."""
    weights = SyntheticWeights(tiny_config(**sizes), write_tokenizer(place))
    (place / "source").mkdir()
    write_huggingface(weights, "mixtral", place / "source", dtype=torch.float32)
    return save_weights(weights, place / "run")


def largest_bytes(sizes: dict[str, int]) -> int:
    return 4 * max(prod(shape) for shape in parameter_shapes(tiny_config(**sizes)).values())


def measure(checkpoint: Path, sizes: dict[str, int], form: str) -> tuple[int, float]:
    """Return the peak growth of a writer's process in bytes, mapped pages included, and its seconds."""
    return in_own_process(write_one, checkpoint, sizes, form, malloc=GLIBC_DEFAULTS)


def write_one(checkpoint: Path, sizes: dict[str, int], form: str) -> tuple[int, float]:
    cfg = tiny_config(**sizes)
    weights = CheckpointWeights(checkpoint, cfg)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as name:
        out = Path(name)
        start_s = time.perf_counter()

        def write() -> None:
            _write(form, weights, checkpoint, out)

        extra = peak_extra_bytes(write)
        return extra, time.perf_counter() - start_s


def _write(form: str, weights: CheckpointWeights, checkpoint: Path, out: Path) -> None:
    if form == "import":
        attached = Attached(DataIdentity(corpus_hash="none", tokenizer_sha256="none"), {"config.toml": b""})
        write_first_checkpoint(HfWeights(checkpoint.parents[2] / "source"), out, attached)
    elif form.startswith("gguf"):
        write_gguf(weights, "mixtral", out, kind=KINDS[form.split()[1]])
    else:
        write_huggingface(weights, "mixtral", out, dtype=getattr(torch, form.split()[1]))


def export_memory_rows() -> list[Row]:
    largest = largest_bytes(LARGE)
    with tempfile.TemporaryDirectory() as place:
        checkpoint = save_synthetic(Path(place), LARGE)
        rows = []
        for form in FORMS:
            extra, seconds = measure(checkpoint, LARGE, form)
            note = f"{extra / MIB:,.0f} of {largest / MIB:,.0f} MiB, {seconds:.1f} s"
            rows.append(Row.of(f"extra memory over the largest tensor, {form}", [extra / largest], note=note))
    return rows
