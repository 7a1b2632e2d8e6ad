"""An untrusted Hugging Face directory is read, or refused in one line, in bounded time and memory."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.exports import VARIANTS, variant_weights
from tests.unit.hostile_fixtures import limits
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.export.hf_config import CONFIG, INDEX, SINGLE
from turnout.training.export.huggingface import write_huggingface
from turnout.training.export.reader import HfWeights

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 10**12, 10**4200, 0.5, -1e308, float("nan"), float("inf"), "", "x" * 100_000,
    "\ud800", "\x1b[2J", [], [10**12], {}, {"a": {}}, [[[]]],
]  # fmt: skip


NAMES = ("mixtral-window", "qwen3-dense-not-normalised", "glm4-all")
IDLE = {"architectures", "dtype", "torch_dtype", "rope_theta", "attention_dropout", "use_cache"}
IDLE |= {"bos_token_id", "eos_token_id"}
IDLE_IN = {
    "mixtral-window": {"num_experts"},
    "qwen3-dense-not-normalised": {"num_local_experts", "sliding_window", "use_sliding_window"},
    "glm4-all": {
        "num_experts", "num_local_experts", "sliding_window", "partial_rotary_factor", "topk_group",
        "num_nextn_predict_layers",
    },
}  # fmt: skip
# Indices into HOSTILE of values that a valid model with the same tensors could have. True reads as 1.
NUMBER, WHOLE, YES_NO, NOTHING = {1, 4, 5, 7}, {1, 4}, {1, 3, 4}, {0, 3, 11, 15, 17}
ACCEPTED = {
    "rms_norm_eps": NUMBER, "initializer_range": NUMBER, "rope_parameters": NOTHING | {18},
    "attention_bias": {3}, "tie_word_embeddings": YES_NO,
}  # fmt: skip
ACCEPTED_IN = {
    "mixtral-window": {"sliding_window": {0, 1, 4, 5, 6, 10}},
    "qwen3-dense-not-normalised": {
        "num_experts_per_tok": WHOLE, "norm_topk_prob": {3}, "decoder_sparse_step": WHOLE
    },
    "glm4-all": {
        "norm_topk_prob": YES_NO, "use_qk_norm": {3}, "n_shared_experts": YES_NO, "n_group": WHOLE,
        "first_k_dense_replace": WHOLE, "routed_scaling_factor": NUMBER,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, place in found.items():
        write_huggingface(variant_weights(name, tokenizer), VARIANTS[name][0], place, dtype=torch.float32)
    return found


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources["glm4-all"], tmp_path / "source"))


def refusal(directory: Path) -> str | None:
    """Return the message with which a directory is refused; None where it is read."""
    with limits():
        try:
            weights = HfWeights(directory)
            weights.read("embed.weight")
        except (CheckpointError, ConfigError) as err:
            said = str(err)
            assert said.isprintable() and len(said) < 600, "one line without terminal escapes"
            return said
    return None


@pytest.mark.parametrize("name", NAMES)
def test_hostile_settings(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources[name], tmp_path / "source"))
    tree, accepted = json.loads((source / CONFIG).read_text()), dict[str, set[int]]()
    for holder, key in [(part, key) for part in (tree, tree["rope_parameters"]) for key in part]:
        whole = holder[key]
        for i, value in enumerate(HOSTILE):
            holder[key] = value
            (source / CONFIG).write_text(json.dumps(tree))
            if refusal(source) is None:
                accepted.setdefault(key, set()).add(i)
        holder[key] = whole
    idle = {key for key, values in accepted.items() if len(values) == len(HOSTILE)}
    assert idle == IDLE | IDLE_IN[name], "keys that do not affect the computation, or repeat another key"
    partly = {key: values for key, values in accepted.items() if key not in idle}
    assert partly == ACCEPTED | ACCEPTED_IN[name]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("num_hidden_layers", "model.layers.3.input_layernorm.weight is absent where its config says"),
        ("first_k_dense_replace", "n_dense_layers"),
        ("max_position_embeddings", "max_position_embeddings is 1000000000000, more than 16,777,216"),
        ("hidden_size", "model.embed_tokens.weight is (300, 64) where its config says"),
    ],
)
def test_giant_sizes_are_refused_at_the_first_missing_tensor(key: str, message: str, source: Path) -> None:
    tree = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**tree, key: 10**12}))
    assert message in (refusal(source) or "")


@pytest.mark.parametrize("spelled", ["\ud800", "a\udfffb", "a\x00b"])
def test_names_that_are_not_valid_text(spelled: str, source: Path) -> None:
    whole = json.loads((source / INDEX).read_text())
    name, file = next(iter(whole["weight_map"].items()))
    for weight_map in (
        {**whole["weight_map"], spelled: file},
        {**whole["weight_map"], name: f"{spelled}.safetensors"},
        {**whole["weight_map"], name: spelled},
    ):
        (source / INDEX).write_text(json.dumps({**whole, "weight_map": weight_map}))
        assert "does not say which file holds which tensor" in (refusal(source) or "")


@pytest.mark.parametrize("file", ["../other.safetensors", "{}/other.safetensors", ".", "", 7, None, ["a"]])
def test_files_outside_the_directory(file: Any, source: Path) -> None:
    """They are refused although they hold the wanted tensors."""
    (shard,) = source.glob("model-*.safetensors")
    shard.rename(source.parent / "other.safetensors")
    file = file.format(source.parent) if isinstance(file, str) else file
    names = json.loads((source / INDEX).read_text())["weight_map"]
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    assert "does not say which file holds which tensor" in (refusal(source) or "")


def test_files_that_are_not_safetensors(source: Path) -> None:
    (shard,) = source.glob("model-*.safetensors")
    whole = shard.read_bytes()
    n_header = struct.unpack("<Q", whole[:8])[0]
    for content in (
        b"",
        whole[:7],
        whole[: 8 + n_header],
        whole[:-1],
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 2) + b"[]",
        whole[:8] + b"\xff" * n_header + whole[8 + n_header :],
    ):
        shard.write_bytes(content)
        assert refusal(source) is not None
    shard.unlink()
    shard.mkdir()
    assert refusal(source) is not None


def test_tensors_of_other_dtypes_and_shapes(source: Path) -> None:
    (shard,) = source.glob("model-*.safetensors")
    tensors = load_file(shard)
    (source / INDEX).unlink()
    shard.unlink()
    for name, tensor in (
        ("model.norm.weight", torch.zeros(64, dtype=torch.int64)),
        ("model.norm.weight", torch.zeros(64, dtype=torch.float64)),
        ("model.norm.weight", torch.tensor(1.0)),
        ("model.norm.weight", torch.zeros(0)),
        ("model.norm.weight", torch.zeros(1, 64)),
        ("\x1b[2J\n", torch.zeros(2)),
    ):
        save_file({**tensors, name: tensor}, source / SINGLE)
        assert refusal(source) is not None
    save_file(tensors, source / SINGLE)
    assert refusal(source) is None
