"""Models to export: small, with large logits, in every shape that an architecture can hold."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import random_state, tiny_config, tiny_decoder
from tests.runs import run_config
from turnout.launch.settings import to_toml
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.checkpoint.manifest import Attached, DataIdentity
from turnout.training.checkpoint.weights import Weights, parameter_shapes
from turnout.training.config.run import RunConfig
from turnout.training.export.to_checkpoint import write_first_checkpoint

# Odd and unequal, but with row widths that are multiples of 32, as Q8_0 needs.
SIZES: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 24,
    "d_expert": 32,
    "n_experts": 6,
    "top_k": 2,
    "vocab_size": 300,
    "seq_len": 41,
}
DENSE = {"n_dense_layers": 1, "d_ff": 96}
SIGMOID = {"score": "sigmoid"}

# By id: the architecture, the differences from SIZES, and the scale of the routers' bias.
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "mixtral-gqa": ("mixtral", {}, 0),
    "mixtral-mha-tied": ("mixtral", {"n_kv_heads": 4, "tie_embeddings": True}, 0),
    "mixtral-12-experts": ("mixtral", {"n_experts": 12, "top_k": 3, "rope_theta": 5e5, "norm_eps": 1e-6}, 0),
    "mixtral-window": ("mixtral", {"sliding_window": 7}, 0),
    "qwen3-gqa": ("qwen3_moe", {"qk_norm": True}, 0),
    "qwen3-mha-tied": ("qwen3_moe", {"qk_norm": True, "n_kv_heads": 4, "tie_embeddings": True}, 0),
    "qwen3-dense-not-normalised": (
        "qwen3_moe",
        {"qk_norm": True, **DENSE, "n_experts": 12, "top_k": 1, "router": {"normalize": False}},
        0,
    ),
    "qwen3-window": ("qwen3_moe", {"qk_norm": True, "sliding_window": 7}, 0),
    "glm4-plain": ("glm4_moe", {"router": SIGMOID}, 0),
    "glm4-all": (
        "glm4_moe",
        {**DENSE, "n_shared_experts": 1, "n_experts": 12, "router": {**SIGMOID, "scale": 2.5}},
        0.3,
    ),
    "glm4-qk-norm-mha-tied": (
        "glm4_moe",
        {"qk_norm": True, "n_kv_heads": 4, "tie_embeddings": True, "n_shared_experts": 2, "router": SIGMOID},
        0.3,
    ),
    "glm4-not-normalised": ("glm4_moe", {"router": {**SIGMOID, "normalize": False}}, 0.3),
}


def variant_config(name: str) -> ModelConfig:
    return tiny_config(**{**SIZES, **VARIANTS[name][1]})


class DecoderWeights:
    """The weights of a live model."""

    def __init__(self, decoder: Decoder, state: RouterState, tokenizer_path: Path) -> None:
        self.place, self.cfg, self.tokenizer_path = Path("memory"), decoder.cfg, tokenizer_path
        self.parameters = {name: p.detach() for name, p in decoder.named_parameters()}
        self.bias_ME = state.bias_ME

    def read(self, name: str, expert: int | None = None) -> Tensor:
        whole = self.parameters[name]
        return whole if expert is None else whole[expert]

    def read_bias(self) -> Tensor:
        return self.bias_ME


def variant_weights(name: str, tokenizer: Path) -> DecoderWeights:
    """Return a variant whose experts and norms all differ; logits have a standard deviation of about 2."""
    cfg, bias = variant_config(name), VARIANTS[name][2]
    decoder = tiny_decoder(cfg, dtype=torch.float32, gain=6.0)
    return DecoderWeights(decoder, random_state(cfg, bias=bias), tokenizer)


def run_config_of(model: ModelConfig, **changes: Any) -> RunConfig:
    train = {"batch_tokens": 4 * model.seq_len, "microbatch_seqs": 2}
    return run_config(model=model.model_dump(), train=train, **changes)


def save_weights(weights: DecoderWeights, run_dir: Path, **manifest: Any) -> Path:
    """Write weights as the checkpoint of a run; return its path."""
    config = to_toml(run_config_of(weights.cfg)).encode()
    tokenizer = weights.tokenizer_path
    files = {"config.toml": config, f"tokenizer{tokenizer.suffix}": tokenizer.read_bytes()}
    attached = Attached(DataIdentity(corpus_hash="none", tokenizer_sha256="none"), files)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_bytes(config)
    return write_first_checkpoint(weights, run_dir, attached, **manifest)


def differing(one: Weights, other: Weights) -> list[str]:
    """Return the names of the parameters whose bits differ between two models."""
    names = parameter_shapes(one.cfg)
    wrong = [name for name in names if not torch.equal(one.read(name), other.read(name))]
    return wrong + ([] if torch.equal(one.read_bias(), other.read_bias()) else ["bias"])
