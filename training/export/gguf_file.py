"""A model of ours as one GGUF file for llama.cpp, written from any weights one expert at a time.

The names are the `gguf` package's own, found from those of Hugging Face. What differs from there: experts are
stacked, and the heads of a llama (which a Mixtral is to llama.cpp) turn neighbours in RoPE, where we and
Hugging Face turn the halves (ggml's NORM against NEOX), so its rows of q and k are reordered.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from torch import Tensor

from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.durable_io import Buffer, Disk
from turnout.training.checkpoint.weights import Weights
from turnout.training.errors import ConfigError
from turnout.training.export.huggingface import counted, read_slot
from turnout.training.export.naming import Architecture, Slot, slots
from turnout.training.export.tokenizer_files import SPACE, read_bpe

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
ROWS_BYTES = 16 << 20
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: a slot of Hugging Face, or those of all experts one after the other.

    n_turned_heads: of so many heads the rows are reordered; 0: of none
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    slots: tuple[Slot, ...]
    n_turned_heads: int

    @property
    def n_bytes(self) -> int:
        return prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))


def check_gguf(cfg: ModelConfig, architecture: Architecture, kind: Kind, tokenizer: Path) -> None:
    """Raise ConfigError for what transformers can load in an architecture and llama.cpp cannot."""
    faults = {
        "has no sliding window in it (model.sliding_window=none would do)": cfg.sliding_window is not None,
    }
    if architecture == "qwen3_moe":
        faults |= {
            "always divides its weights by their sum (model.router.normalize=true would do)": (
                not cfg.router.normalize
            ),
            "has no dense layers in it (model.n_dense_layers=0 would do)": cfg.n_dense_layers > 0,
        }
    if wrong := [fault for fault, is_wrong in faults.items() if is_wrong]:
        raise ConfigError(f"llama.cpp cannot hold this {architecture}: it {', and it '.join(wrong)}")
    if tokenizer.suffix != ".model":
        raise ConfigError(
            f"{tokenizer}: llama.cpp knows the pre-tokenizers of published tokenizer.json files only, and "
            "would split text otherwise than training did; GGUF needs a sentencepiece tokenizer.model"
        )
    read_bpe(tokenizer)
    widths = {"d_model": cfg.d_model, "d_expert": cfg.d_expert, "n_heads * d_head": cfg.n_heads * cfg.d_head}
    widths |= {"d_ff": cfg.d_ff} if cfg.d_ff is not None else {}
    if kind == Kind.Q8_0 and (odd := [f"{name}={width}" for name, width in widths.items() if width % BLOCK]):
        raise ConfigError(
            f"--dtype q8_0 needs rows of whole blocks of {BLOCK}, and model.{', model.'.join(odd)} is not; "
            "use --dtype bfloat16"
        )


def gguf_tensors(architecture: Architecture, cfg: ModelConfig, kind: Kind) -> list[GgufTensor]:
    """Return the tensors of a model's file in order."""
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
        # llama.cpp's own converters keep vectors and routers in fp32 too.
        is_matrix = len(shape) > 1 and not theirs.endswith(
            ("mlp.gate.weight", "block_sparse_moe.gate.weight")
        )
        heads = {"self_attn.q_proj.weight": cfg.n_heads, "self_attn.k_proj.weight": cfg.n_kv_heads}
        turned = next((n for ending, n in heads.items() if theirs.endswith(ending)), 0)
        turned = turned if architecture == "mixtral" else 0
        tensors.append(GgufTensor(name, shape, kind if is_matrix else Kind.F32, tuple(parts), turned))
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

    on_written: is told of bytes as they are written.
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
    # The package would want whole tensors next, stacked experts too; the rest is bytes and padding.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    content = header.read_bytes()
    header.unlink()
    Disk().write(path, counted(_chunks(weights, tensors, content), on_written))
    return path


def _chunks(weights: Weights, tensors: list[GgufTensor], header: bytes) -> Iterator[Buffer]:
    yield header + _padding(len(header))
    for tensor in tensors:
        for slot in tensor.slots:
            yield from _quantised(read_slot(weights, slot), tensor)
        yield _padding(tensor.n_bytes)


def _padding(n_bytes: int) -> bytes:
    return bytes(-n_bytes % gguf.GGUF_DEFAULT_ALIGNMENT)


def _quantised(values: Tensor, tensor: GgufTensor) -> Iterator[Buffer]:
    if tensor.n_turned_heads:
        values = to_neighbours(values, tensor.n_turned_heads)
    rows = values.reshape(-1, values.size(-1))
    for part in rows.split(max(1, ROWS_BYTES // (4 * rows.size(1)))):
        yield np.ascontiguousarray(gguf.quantize(part.numpy(), tensor.kind)).view(np.uint8).data


def to_stored(kind: Kind, name: str, values: Tensor) -> Tensor:
    """Return one of our parameters as a file of this kind holds it."""
    if values.ndim == 1 or name.endswith("router.weight"):
        return values
    if name.endswith("experts.gate_up"):  # the file's rows are our columns, and its scales are of its rows
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
    """Write a sentencepiece model's pieces; what the model's vocabulary has beyond them is never used."""
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
    # Where there is none, documents begin with eos, as data/tokenizer.py has it.
    writer.add_bos_token_id(model.bos_id() if model.bos_id() >= 0 else model.eos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(_has_dummy_prefix(model))


def _has_dummy_prefix(model: sentencepiece.SentencePieceProcessor) -> bool:
    return model.encode("a", out_type=str)[0].startswith(SPACE)
