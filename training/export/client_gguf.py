"""The client of an exported GGUF file: llama.cpp where it is installed, else the `gguf` package reads it."""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.weights import Weights
from turnout.training.errors import ExportError
from turnout.training.export.gguf_file import ARCHITECTURES, GgufTensor, Kind, gguf_tensors
from turnout.training.export.naming import Architecture
from turnout.training.export.tokenizer_files import read_bpe

UNUSED = 5  # of a piece's type


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def check_loads(path: Path) -> None:
    """Raise ExportError where llama.cpp does not load a file."""
    _load(path, 8)


def _load(path: Path, length: int) -> Any:
    import llama_cpp  # optional, and a large native library

    try:
        return llama_cpp.Llama(
            model_path=str(path),
            n_ctx=length,
            n_batch=length,
            n_ubatch=length,
            logits_all=True,
            verbose=False,
            flash_attn=False,
            type_k=Kind.F32.value,
            type_v=Kind.F32.value,
        )
    except Exception as err:  # whatever a client raises, the file is not to be handed over
        raise ExportError(f"{client_name()} cannot load it: {err}") from err


def llama_cpp_logits(path: Path, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return llama.cpp's logits [length, V] of each row of tokens. Raises ExportError.

    Its key and value cache is fp32: the default, fp16, costs 1e-2 of a logit by itself.
    """
    model = _load(path, max(map(len, rows)))
    logits = []
    for row in rows:
        model.reset()
        model.eval(row.tolist())
        logits.append(torch.from_numpy(np.array(model.scores[: len(row)])))
    return logits


def client_name() -> str:
    import llama_cpp

    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"


def check_read_back(path: Path, weights: Weights, architecture: Architecture, kind: Kind) -> str:
    """Compare every tensor and setting of a file with weights rounded as it is; return that in words.

    Shares with the writer only the names of tensors: experts are compared whole, and the heads of q and k by
    where RoPE looks for a pair. Raises ExportError.
    """
    reader, cfg, tokenizer = gguf.GGUFReader(path), weights.cfg, load_tokenizer(weights.tokenizer_path)
    _check_settings(reader, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[architecture]], cfg, tokenizer)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {tensor.name: tensor for tensor in gguf_tensors(architecture, cfg, kind)}
    if found.keys() != wanted.keys():
        raise ExportError(f"{path.name}: holds other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for name, tensor in wanted.items():
        read = torch.from_numpy(gguf.dequantize(found[name].data, found[name].tensor_type).copy())
        difference = float((read.view(tensor.shape) - _truth(weights, tensor, cfg)).abs().max())
        if not difference == 0:
            raise ExportError(
                f"{path.name}: {name} is not the tensor that was exported: largest difference "
                f"{difference:.3g}. Nothing was kept"
            )
    return (
        f"read back with gguf {version('gguf')}: all {len(wanted)} tensors are those of the model, bit for "
        "bit as they were rounded"
    )


def _truth(weights: Weights, tensor: GgufTensor, cfg: ModelConfig) -> Tensor:
    """Return what a tensor has to be, looked up by our own names."""
    slot = tensor.slots[0]
    if slot.kind == "zeros":
        return torch.zeros(tensor.shape)
    if slot.kind == "bias":
        assert slot.index is not None
        return weights.read_bias()[slot.index]
    whole = weights.read(slot.ours)
    if slot.half is not None:
        columns = slice(cfg.d_expert) if slot.half == "gate" else slice(cfg.d_expert, None)
        return whole[:, :, columns].transpose(1, 2)
    if not tensor.n_turned_heads:
        return whole
    # RoPE of ggml turns rows (2i, 2i + 1) of a head, ours turns (i, i + A/2).
    order = [
        head * cfg.d_head + i // 2 + (i % 2) * (cfg.d_head // 2)
        for head in range(whole.size(0) // cfg.d_head)
        for i in range(cfg.d_head)
    ]
    return whole[order]


def _check_settings(reader: gguf.GGUFReader, arch: str, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    wanted: dict[str, object] = {
        "general.architecture": arch,
        f"{arch}.block_count": cfg.n_layers,
        f"{arch}.embedding_length": cfg.d_model,
        f"{arch}.attention.head_count": cfg.n_heads,
        f"{arch}.attention.head_count_kv": cfg.n_kv_heads,
        f"{arch}.attention.key_length": cfg.d_head,
        f"{arch}.rope.freq_base": cfg.rope_theta,
        f"{arch}.attention.layer_norm_rms_epsilon": cfg.norm_eps,
        f"{arch}.expert_count": cfg.n_experts,
        f"{arch}.expert_used_count": cfg.top_k,
        f"{arch}.context_length": cfg.seq_len,
        f"{arch}.vocab_size": cfg.vocab_size,
        f"{arch}.attention.value_length": cfg.d_head,
        f"{arch}.rope.dimension_count": cfg.d_head,
        f"{arch}.feed_forward_length": cfg.d_expert if cfg.d_ff is None else cfg.d_ff,
    }
    if arch != "llama":
        wanted[f"{arch}.expert_feed_forward_length"] = cfg.d_expert
    if arch == "glm4moe":
        wanted |= {
            f"{arch}.expert_shared_count": max(1, cfg.n_shared_experts),
            f"{arch}.leading_dense_block_count": cfg.n_dense_layers,
            f"{arch}.expert_gating_func": 2,  # sigmoid
            f"{arch}.expert_weights_scale": cfg.router.scale,
            f"{arch}.expert_weights_norm": cfg.router.normalize,
        }
    # gguf numbers the types of pieces as sentencepiece does.
    pieces = [(piece.piece, piece.type) for piece in read_bpe(tokenizer.path).pieces]
    pieces += [(f"[UNUSED{i}]", UNUSED) for i in range(len(pieces), cfg.vocab_size)]
    wanted |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    for key, value in wanted.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        is_same = np.float32(found) == np.float32(value) if isinstance(value, float) else found == value
        if not is_same:
            here, there = (str(x)[:60] for x in (found, value))
            raise ExportError(f"{key} was written as {here} where the model has {there}; nothing was kept")
