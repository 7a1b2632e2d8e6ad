"""Weights read from files: a tensor too large to be read at once, and each of its experts, are complete."""

from pathlib import Path

import torch

from tests.exports import DecoderWeights, differing, save_weights
from tests.models import random_state, tiny_config
from turnout.moe.model import build_decoder
from turnout.training.checkpoint.weights import MAPPED_BYTES, CheckpointWeights
from turnout.training.export.huggingface import write_huggingface
from turnout.training.export.reader import HfWeights


def test_a_tensor_larger_than_the_mapped_bytes_is_read_completely(tokenizer: Path, tmp_path: Path) -> None:
    cfg = tiny_config(n_layers=1, d_model=120, vocab_size=70_001, tie_embeddings=True, qk_norm=True)
    decoder = build_decoder(cfg)
    with torch.no_grad():
        for parameter in decoder.parameters():  # values that are all different
            parameter.view(-1).copy_(torch.arange(parameter.numel()))
    weights = DecoderWeights(decoder, random_state(cfg), tokenizer)
    n_bytes = 4 * weights.parameters["embed.weight"].numel()
    assert MAPPED_BYTES < n_bytes < 4 << 24, "above 2**24 fp32 cannot represent all integers"
    checkpoint = CheckpointWeights(save_weights(weights, tmp_path / "run"), cfg)
    assert differing(checkpoint, weights) == []
    name = "blocks.0.moe.experts.gate_up"
    assert all(torch.equal(checkpoint.read(name, i), weights.read(name, i)) for i in range(cfg.n_experts))
    (out := tmp_path / "hf").mkdir()
    write_huggingface(checkpoint, "qwen3_moe", out, dtype=torch.float32)
    assert differing(HfWeights(out), weights) == []
