"""Writing an export takes the memory of the largest tensor plus a constant, however large the model."""

from pathlib import Path

import pytest

from tests.bench.export_memory import CONSTANT_BYTES, MANY, SMALL, largest_bytes, measure, save_synthetic


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthetic(tmp_path_factory.mktemp("synthetic"), SMALL)


@pytest.mark.parametrize("form", ["hf bfloat16", "gguf float32", "import"])
def test_memory_is_bounded(form: str, checkpoint: Path) -> None:
    n_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    bound = 1.3 * largest_bytes(SMALL) + CONSTANT_BYTES
    assert bound < 0.8 * n_bytes, "a writer that holds the whole model would pass"
    extra, _ = measure(checkpoint, SMALL, form)
    assert extra < bound, f"{extra / 2**20:.0f} MiB"


@pytest.mark.long
def test_each_expert_is_one_tensor(tmp_path: Path) -> None:
    """One expert is in memory at a time; each of a layer's three matrices is nearly twice the bound."""
    checkpoint = save_synthetic(tmp_path, MANY)
    bound = largest_bytes(MANY) // MANY["n_experts"] + CONSTANT_BYTES
    assert bound < 0.6 * largest_bytes(MANY), "a writer that holds a layer's experts would pass"
    for form in ("hf bfloat16", "gguf float32", "import"):
        extra, _ = measure(checkpoint, MANY, form)
        assert extra < bound, f"{form}: {extra / 2**20:.0f} MiB"
