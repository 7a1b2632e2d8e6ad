"""A model that accelerate spreads over memory and disk computes the same as in one piece."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import random_state, tiny_decoder
from tests.runs import run_config
from tests.saved_models import save_model
from tests.unit.data_fixtures import write_tokenizer
from turnout.launch.models import open_weights
from turnout.moe.kv_cache import CachedDecoder
from turnout.training.checkpoint.weights import Weights, load_decoder
from turnout.training.errors import ConfigError
from turnout.training.generation.offload import load_spread

N_LAYERS = 5
PROMPTS = ((3, 1, 4, 1, 5), (9,), (2, 6, 5))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "head"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    directory = Path(tmp_path_factory.mktemp("saved"))
    model = {
        "n_layers": N_LAYERS, "n_dense_layers": 1, "d_ff": 24, "n_shared_experts": 1, "seq_len": 24,
        "vocab_size": 300, "tie_embeddings": request.param,
    }  # fmt: skip
    cfg = run_config(model=model)
    decoder = tiny_decoder(cfg.model, dtype=torch.float32)
    path = save_model(
        directory / "run", cfg, decoder, random_state(cfg.model, bias=0.3), write_tokenizer(directory)
    )
    return open_weights(path)


def run(model: CachedDecoder) -> list[Any]:
    logits, cache = model.prefill(PROMPTS, 20)
    out = [logits]
    for _ in range(6):
        out.append(model.extend(out[-1].argmax(-1).tolist(), cache))
    return out


def spread(
    weights: Weights, tmp_path: Path, max_bytes: int | None, dtype: torch.dtype
) -> tuple[CachedDecoder, str]:
    return load_spread(
        weights, max_bytes=max_bytes, offload_dir=tmp_path, dtype=dtype, expert_backend="reference"
    )


def block_bytes(weights: Weights) -> tuple[list[int], int]:
    """Return the fp32 bytes of each block, and of the rest."""
    blocks, ends = [0] * N_LAYERS, 0
    for name, parameter in load_decoder(weights)[0].named_parameters():
        if name.startswith("blocks."):
            blocks[int(name.split(".")[1])] += 4 * parameter.numel()
        else:
            ends += 4 * parameter.numel()
    return blocks, ends


@pytest.mark.parametrize(("n_resident", "dtype"), [(0, torch.float32), (2, torch.bfloat16)], ids=str)
def test_blocks_on_disk_compute_the_same(
    n_resident: int, dtype: torch.dtype, weights: Weights, tmp_path: Path
) -> None:
    want = run(CachedDecoder(*load_decoder(weights, dtype=dtype)))
    blocks, ends = block_bytes(weights)
    room = (ends + sum(blocks[:n_resident]) + max(blocks)) * dtype.itemsize // 4
    model, summary = spread(weights, tmp_path, room, dtype)
    on_disk = {name for name, p in model.named_parameters() if p.is_meta}
    assert {int(name.split(".")[1]) for name in on_disk} == set(range(n_resident, N_LAYERS))
    assert f"{N_LAYERS - n_resident} on disk" in summary and str(tmp_path) in summary
    for got, expected in zip(run(model), want, strict=True):
        assert torch.equal(got, expected)
    assert {name for name, p in model.named_parameters() if p.is_meta} == on_disk, "a block stayed in memory"
    assert len([*tmp_path.glob("*.dat")]) == len(on_disk)


def test_what_fits_is_all_in_memory(weights: Weights, tmp_path: Path) -> None:
    model, summary = spread(weights, tmp_path, None, torch.float32)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert summary.startswith(f"blocks: {N_LAYERS} on the CPU (")
    want = run(CachedDecoder(*load_decoder(weights)))
    assert all(torch.equal(a, b) for a, b in zip(run(model), want, strict=True))


def test_too_little_memory_is_refused(weights: Weights, tmp_path: Path) -> None:
    blocks, ends = block_bytes(weights)
    with pytest.raises(ConfigError, match=r"on the CPU is below .* and a block .*raise --max-memory"):
        spread(weights, tmp_path, ends + max(blocks) - 1, torch.float32)
