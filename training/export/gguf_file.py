"""A model as one GGUF file for llama.cpp: written one expert at a time, and read back.

Tensor names are the `gguf` package's own, looked up from Hugging Face's. Two things differ from Hugging Face.
Experts are stacked. And llama.cpp treats a Mixtral as a llama, whose RoPE rotates neighbouring rows of a
head (ggml's NORM), while ours and Hugging Face's rotates the two halves (NEOX). So its rows of q and k are
reordered.

Reading back shares only the tensor names with the writer: it compares experts whole, and computes by itself
which rows RoPE pairs.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from torch import Tensor

from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.durable_io import Buffer, Disk
from turnout.training.checkpoint.weights import Weights
from turnout.training.errors import ConfigError, ExportError
from turnout.training.export.hf_config import Architecture
from turnout.training.export.huggingface import SPACE, Slot, read_bpe, read_slot, slots

GGUF_FILE = "model.gguf"
ARCHITECTURES: dict[Architecture, gguf.MODEL_ARCH] = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
}
Kind = gguf.GGMLQuantizationType
KINDS = {"float32": Kind.F32, "bfloat16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
BLOCK = 32  # elements of a row that share one scale in Q8_0
UNUSED = 5  # sentencepiece's type of a piece that is never used
ROWS_BYTES = 16 << 20
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: one slot of Hugging Face, or the slots of all experts, stacked.

    n_reordered_heads: the heads whose rows are reordered for ggml's RoPE; 0 where no rows are
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    slots: tuple[Slot, ...]
    n_reordered_heads: int

    @property
    def n_bytes(self) -> int:
        return prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))


def check_gguf(cfg: ModelConfig, architecture: Architecture, kind: Kind, tokenizer: Path) -> None:
    """Raise ConfigError where llama.cpp cannot load a model that transformers can load."""
    faults = {
        "has no sliding window (model.sliding_window=none would do)": cfg.sliding_window is not None,
    }
    if architecture == "qwen3_moe":
        faults |= {
            "always divides its weights by their sum (model.router.normalize=true would do)": (
                not cfg.router.normalize
            ),
            "has no dense layers (model.n_dense_layers=0 would do)": cfg.n_dense_layers > 0,
        }
    if wrong := [fault for fault, is_wrong in faults.items() if is_wrong]:
        raise ConfigError(f"llama.cpp cannot load this {architecture}: it {', and it '.join(wrong)}")
    if tokenizer.suffix != ".model":
        raise ConfigError(
            f"{tokenizer}: llama.cpp knows only the pre-tokenizers of published tokenizer.json files and "
            "would split text differently than training did; use a sentencepiece tokenizer.model for GGUF"
        )
    read_bpe(tokenizer)
    widths = {"d_model": cfg.d_model, "d_expert": cfg.d_expert, "n_heads * d_head": cfg.n_heads * cfg.d_head}
    widths |= {"d_ff": cfg.d_ff} if cfg.d_ff is not None else {}
    if kind == Kind.Q8_0 and (odd := [f"{name}={width}" for name, width in widths.items() if width % BLOCK]):
        raise ConfigError(
            f"--dtype q8_0 needs multiples of {BLOCK}, and model.{', model.'.join(odd)} is not; use --dtype "
            "bfloat16"
        )


def gguf_tensors(architecture: Architecture, cfg: ModelConfig, kind: Kind) -> list[GgufTensor]:
    """Return the tensors of a model's file, in file order."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], cfg.n_layers)
    grouped: dict[str, list[Slot]] = {}
    for slot in slots(architecture, cfg):
        grouped.setdefault(_EXPERT.sub(".experts.", slot.name), []).append(slot)
    tensors = []
    for theirs, parts in grouped.items():
        looked_up = theirs.replace("e_score_correction_bias", "e_score_correction.bias")
        name = names.get_name(looked_up, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf knows no name for {theirs}"
        shape = parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)
        # llama.cpp's own converters also keep vectors and routers in fp32.
        is_matrix = len(shape) > 1 and not theirs.endswith(
            ("mlp.gate.weight", "block_sparse_moe.gate.weight")
        )
        heads = {"self_attn.q_proj.weight": cfg.n_heads, "self_attn.k_proj.weight": cfg.n_kv_heads}
        n_reordered = next((n for ending, n in heads.items() if theirs.endswith(ending)), 0)
        n_reordered = n_reordered if architecture == "mixtral" else 0
        tensors.append(GgufTensor(name, shape, kind if is_matrix else Kind.F32, tuple(parts), n_reordered))
    return tensors


def write_gguf(
    weights: Weights,
    architecture: Architecture,
    directory: Path,
    *,
    kind: Kind,
    on_written: Callable[[int], None] | None = None,
) -> Path:
    """Write model.gguf into a directory; return its path. Raises CheckpointError or OSError.

    on_written: called with the bytes written so far.
    """
    path = directory / GGUF_FILE
    tensors = gguf_tensors(architecture, weights.cfg, kind)
    header = path.with_suffix(".header")
    writer = gguf.GGUFWriter(header, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[architecture]])
    _add_settings(writer, architecture, weights.cfg, kind)
    _add_tokenizer(writer, weights.tokenizer_path, weights.cfg.vocab_size)
    for tensor in tensors:
        dtype = np.dtype(np.float32 if tensor.kind == Kind.F32 else np.uint8)
        shape = (
            tensor.shape
            if tensor.kind == Kind.F32
            else gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        )
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.n_bytes, raw_dtype=tensor.kind)
    # The package could write the tensors, too, but only whole ones, so all experts of a layer at once. What
    # follows the header is only their bytes, padded.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    content = header.read_bytes()
    header.unlink()
    Disk().write(path, _chunks(weights, tensors, content, on_written))
    return path


def _chunks(
    weights: Weights, tensors: list[GgufTensor], header: bytes, on_written: Callable[[int], None] | None
) -> Iterator[Buffer]:
    """Yield the bytes of the file; report them once they are written."""
    yield header + _padding(len(header))
    n_written = 0
    for tensor in tensors:
        for slot in tensor.slots:
            for chunk in _quantised(read_slot(weights, slot), tensor):
                yield chunk
                n_written += len(chunk)
                if on_written is not None:
                    on_written(n_written)
        yield _padding(tensor.n_bytes)


def _padding(n_bytes: int) -> bytes:
    return bytes(-n_bytes % gguf.GGUF_DEFAULT_ALIGNMENT)


def _quantised(values: Tensor, tensor: GgufTensor) -> Iterator[Buffer]:
    if tensor.n_reordered_heads:
        values = to_neighbours(values, tensor.n_reordered_heads)
    rows = values.reshape(-1, values.size(-1))
    for part in rows.split(max(1, ROWS_BYTES // (4 * rows.size(1)))):
        yield np.ascontiguousarray(gguf.quantize(part.numpy(), tensor.kind)).view(np.uint8).data


def to_stored(kind: Kind, name: str, values: Tensor) -> Tensor:
    """Return a parameter, of any shape, rounded as a file of this kind stores it."""
    if values.ndim == 1 or name.endswith("router.weight"):
        return values
    if name.endswith("experts.gate_up"):  # the file holds it transposed; scales belong to its rows
        return to_stored(kind, "", values.transpose(-1, -2).contiguous()).transpose(-1, -2).contiguous()
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), kind), kind))


def to_neighbours(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k [n_heads * A, D]: row i of a head's first half beside i of its second."""
    halves = rows.view(n_heads, 2, -1, rows.size(1))
    return halves.transpose(1, 2).reshape(rows.shape)


def _add_settings(writer: gguf.GGUFWriter, architecture: Architecture, cfg: ModelConfig, kind: Kind) -> None:
    writer.add_context_length(cfg.seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.d_ff or cfg.d_expert)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_key_length(cfg.d_head)
    writer.add_value_length(cfg.d_head)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.d_head)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_expert_count(cfg.n_experts)
    writer.add_expert_used_count(cfg.top_k)
    writer.add_file_type(FILE_TYPES[kind])
    if architecture == "mixtral":
        return
    writer.add_expert_feed_forward_length(cfg.d_expert)
    if architecture == "glm4_moe":
        writer.add_expert_shared_count(cfg.n_shared_experts or 1)
        writer.add_leading_dense_block_count(cfg.n_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(cfg.router.scale)
        writer.add_expert_weights_norm(cfg.router.normalize)


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path, vocab_size: int) -> None:
    """Write a sentencepiece model's pieces, and unused ones up to the model's vocabulary size."""
    model, types = sentencepiece.SentencePieceProcessor(model_file=str(path)), gguf.TokenType
    tokens, scores, kinds = list[bytes](), list[float](), list[int]()
    for i in range(model.piece_size()):
        tokens.append(model.id_to_piece(i).encode())
        scores.append(model.get_score(i))
        is_of_kind = {
            types.UNKNOWN: model.is_unknown(i),
            types.CONTROL: model.is_control(i),
            types.BYTE: model.is_byte(i),
            types.UNUSED: model.is_unused(i),
        }
        kinds.append(next((kind for kind, is_it in is_of_kind.items() if is_it), types.NORMAL))
    for i in range(model.piece_size(), vocab_size):
        tokens.append(f"[UNUSED{i}]".encode())
        scores.append(-1e4)
        kinds.append(types.UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    # Without a begin-of-text token documents begin with eos, as in data/tokenizer.py.
    writer.add_bos_token_id(model.bos_id() if model.bos_id() >= 0 else model.eos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(_has_dummy_prefix(model))


def _has_dummy_prefix(model: sentencepiece.SentencePieceProcessor) -> bool:
    pieces: list[str] = model.encode("a", out_type=str)
    return pieces[0].startswith(SPACE)


def read_back_gguf(path: Path, weights: Weights, architecture: Architecture, kind: Kind) -> str:
    """Compare every tensor and setting of a file with the model's; return a sentence about the result.

    Raises ExportError where anything differs from the weights, rounded as the file stores them.
    """
    reader, cfg, tokenizer = gguf.GGUFReader(path), weights.cfg, load_tokenizer(weights.tokenizer_path)
    _check_settings(reader, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[architecture]], cfg, tokenizer)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {tensor.name: tensor for tensor in gguf_tensors(architecture, cfg, kind)}
    if found.keys() != wanted.keys():
        differing = sorted(found.keys() ^ wanted.keys())[:3]
        raise ExportError(f"{path.name}: missing or unexpected tensors: {differing}; nothing was kept")
    for name, tensor in wanted.items():
        read = torch.from_numpy(gguf.dequantize(found[name].data, found[name].tensor_type).copy())
        difference = float(
            (read.view(tensor.shape) - _expected_tensor(weights, tensor, cfg, kind)).abs().max()
        )
        if not difference == 0:
            raise ExportError(
                f"{path.name}: {name} is not the tensor that was exported: largest difference "
                f"{difference:.3g}; nothing was kept"
            )
    return (
        f"read back with gguf {version('gguf')}: all {len(wanted)} tensors are the model's, bit for bit "
        "after rounding"
    )


def _expected_tensor(weights: Weights, tensor: GgufTensor, cfg: ModelConfig, kind: Kind) -> Tensor:
    """Return what a tensor of the file has to hold, looked up by our own names."""
    slot = tensor.slots[0]
    if slot.kind == "zeros":
        return torch.zeros(tensor.shape)
    if slot.kind == "bias":
        assert slot.index is not None
        return weights.read_bias()[slot.index]
    whole = to_stored(kind, slot.ours, weights.read(slot.ours))
    if slot.half is not None:
        columns = slice(cfg.d_expert) if slot.half == "gate" else slice(cfg.d_expert, None)
        return whole[:, :, columns].transpose(1, 2)
    if not tensor.n_reordered_heads:
        return whole
    # ggml's RoPE rotates rows 2i and 2i + 1 of a head, ours rows i and i + A/2.
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
    # gguf uses sentencepiece's numbers for the types of pieces.
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
