"""The table of Hugging Face's tensor names, and the writer of a directory, one tensor at a time.

    config.json, generation_config.json             ours; transformers 4 and 5 read both
    model-00001-of-00002.safetensors .., index      per-expert tensors
    tokenizer.model, tokenizer.json, tokenizer_config.json

slots() is the table of names; export reads it forwards, import (reader.py) backwards. Every tensor of a file
is a slot, which names the parameter of ours that fills it. Contract: each parameter of the model, expert by
expert, fills at least one slot, and nothing else does.

Contract of the tokenizer, which AutoTokenizer of transformers 4 and 5 loads: without special tokens it gives
the ids of training, also for text that spells a control token. With them it also puts the begin-of-text token
first, where every document of training has it.

Writing needs memory for the largest tensor (one expert's, where experts are stacked) and some MiB.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE
from torch import Tensor

from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.durable_io import Buffer, Disk
from turnout.training.checkpoint.safetensors_stream import Stored, cut_by_bytes, safetensors_chunks
from turnout.training.checkpoint.weights import Weights
from turnout.training.errors import ConfigError
from turnout.training.export.hf_config import CONFIG, DENSE, INDEX, Architecture, to_hf_config

MAX_SHARD_BYTES = 5 * 10**9
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
)
SPACE = "\u2581"  # what sentencepiece writes for a space
# Texts that every exported tokenizer has to encode as ours does, beside its own control tokens.
PROBES = (
    "Hello   world\n\n\tx = 1234567  \r\n",
    " leading and trailing  ",
    "",
    "\n\n\n",
    "caf\u00e9 e\u0301 \U0001f600 \u200b a\u00a0b \x00\x01 \ufeff",
    "0x0A <0x0A> def f(x):\n    return x\n",
)

ATTENTION = {part: f"self_attn.{part}_proj" for part in "qkvo"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL_PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Slot:
    """One tensor of a file.

    name    the tensor's name in the file
    kind    parameter: our parameter `ours`, or one expert of it; bias: a row of the routers' bias; zeros:
            filled with zeros, because we have no such tensor
    ours    our name of the parameter
    index   parameter: the expert, or None; bias: the row, which counts the expert layers
    half    the slot holds the gate or the up columns of an expert's gate_up [D, 2 * d_expert], transposed
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["parameter", "bias", "zeros"] = "parameter"
    ours: str = ""
    index: int | None = None
    half: Literal["gate", "up"] | None = None


def slots(architecture: Architecture, cfg: ModelConfig) -> Iterator[Slot]:
    """Yield the slots of a model in the order of its layers. The head of a tied model has its own slot."""
    width, rows = cfg.d_model, cfg.vocab_size
    yield Slot("model.embed_tokens.weight", (rows, width), ours="embed.weight")
    for layer in range(cfg.n_layers):
        yield from _block_slots(architecture, cfg, layer)
    yield Slot("model.norm.weight", (width,), ours="norm.weight")
    # Readers differ in whether they heed tie_word_embeddings (vLLM ignores it for glm4_moe).
    yield Slot("lm_head.weight", (rows, width), ours="embed.weight" if cfg.tie_embeddings else "head.weight")


def _block_slots(architecture: Architecture, cfg: ModelConfig, layer: int) -> Iterator[Slot]:
    ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
    q_width, kv_width = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    shapes = {"q": (q_width, cfg.d_model), "o": (cfg.d_model, q_width)}
    for norm, their_norm in NORMS.items():
        yield Slot(f"{theirs}{their_norm}.weight", (cfg.d_model,), ours=f"{ours}{norm}.weight")
    for part, their_part in ATTENTION.items():
        shape = shapes.get(part, (kv_width, cfg.d_model))
        yield Slot(f"{theirs}{their_part}.weight", shape, ours=f"{ours}attn.{part}.weight")
    if cfg.qk_norm:
        for norm, their_norm in QK_NORMS.items():
            yield Slot(f"{theirs}{their_norm}.weight", (cfg.d_head,), ours=f"{ours}{norm}.weight")
    if layer < cfg.n_dense_layers:
        assert cfg.d_ff is not None
        yield from _swiglu_slots(f"{theirs}mlp.", f"{ours}ffn.", cfg.d_model, cfg.d_ff)
    elif architecture in DENSE:
        # Import only: every expert of the layer is a copy of the dense model's feed-forward layer.
        for expert in range(cfg.n_experts):
            yield from _expert_slots(f"{theirs}mlp.", f"{ours}moe.", PROJECTIONS, expert, cfg)
    else:
        yield from _moe_slots(architecture, cfg, layer)


def _moe_slots(architecture: Architecture, cfg: ModelConfig, layer: int) -> Iterator[Slot]:
    ours, theirs = f"blocks.{layer}.moe.", f"model.layers.{layer}.mlp."
    projections = PROJECTIONS
    if architecture == "mixtral":
        theirs, projections = f"model.layers.{layer}.block_sparse_moe.", MIXTRAL_PROJECTIONS
    yield Slot(f"{theirs}gate.weight", (cfg.n_experts, cfg.d_model), ours=f"{ours}router.weight")
    if architecture == "glm4_moe":
        row = layer - cfg.n_dense_layers
        yield Slot(f"{theirs}gate.e_score_correction_bias", (cfg.n_experts,), kind="bias", index=row)
    for expert in range(cfg.n_experts):
        yield from _expert_slots(f"{theirs}experts.{expert}.", ours, projections, expert, cfg)
    if architecture == "glm4_moe":
        kind: Literal["parameter", "zeros"] = "parameter" if cfg.n_shared_experts else "zeros"
        # glm4_moe needs a shared expert (vLLM divides by their number); without one, zeros are written.
        width = cfg.d_shared or cfg.d_expert
        yield from _swiglu_slots(f"{theirs}shared_experts.", f"{ours}shared.", cfg.d_model, width, kind)


def _expert_slots(
    theirs: str, ours: str, projections: Mapping[str, str], expert: int, cfg: ModelConfig
) -> Iterator[Slot]:
    for part, their_part in projections.items():
        name = f"{theirs}{their_part}.weight"
        if part == "down":
            yield Slot(name, (cfg.d_model, cfg.d_expert), ours=f"{ours}experts.down", index=expert)
        else:
            half: Literal["gate", "up"] = "gate" if part == "gate" else "up"
            shape = (cfg.d_expert, cfg.d_model)
            yield Slot(name, shape, ours=f"{ours}experts.gate_up", index=expert, half=half)


def _swiglu_slots(
    theirs: str, ours: str, d_model: int, width: int, kind: Literal["parameter", "zeros"] = "parameter"
) -> Iterator[Slot]:
    for part, their_part in PROJECTIONS.items():
        shape = (d_model, width) if part == "down" else (width, d_model)
        name = f"{ours}{part}.weight" if kind == "parameter" else ""
        yield Slot(f"{theirs}{their_part}.weight", shape, kind, name)


def half_of(gate_up: Tensor, half: Literal["gate", "up"]) -> Tensor:
    """Return gate or up, [..., d_expert, D], of experts' gate_up [..., D, 2 * d_expert]."""
    return gate_up.chunk(2, dim=-1)[0 if half == "gate" else 1].transpose(-1, -2)


def write_huggingface(
    weights: Weights,
    architecture: Architecture,
    directory: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Fill an empty directory. Raises CheckpointError, ConfigError (tokenizer) or OSError.

    dtype: float32 or bfloat16. The routers' bias is always fp32, as transformers keeps it.
    on_written: called with the bytes of tensors written so far.
    """
    disk, cfg = Disk(), weights.cfg
    tokenizer = load_tokenizer(weights.tokenizer_path)
    write_tokenizer(weights.tokenizer_path, directory, seq_len=cfg.seq_len)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = to_hf_config(
        architecture,
        cfg,
        dtype=str(dtype).removeprefix("torch."),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    _write_json(disk, directory / CONFIG, config)
    _write_json(disk, directory / GENERATION_CONFIG, {**ids, "pad_token_id": tokenizer.eos_id})
    shards = list(cut_by_bytes(slots(architecture, cfg), partial(_n_bytes, dtype), max_shard_bytes))
    weight_map: dict[str, str] = {}
    n_written = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {
            slot.name: Stored(slot.shape, _dtype_of(slot, dtype), partial(_read_parts, weights, slot))
            for slot in shard
        }
        chunks = safetensors_chunks(stored, {"format": "pt"})
        disk.write(directory / file, report_written(chunks, on_written, n_written))
        n_written += (directory / file).stat().st_size
        weight_map |= dict.fromkeys(stored, file)
    total = total_bytes(architecture, weights, dtype)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(disk, directory / INDEX, index)


def total_bytes(architecture: Architecture, weights: Weights, dtype: torch.dtype) -> int:
    """Return the bytes of all tensors."""
    return sum(_n_bytes(dtype, slot) for slot in slots(architecture, weights.cfg))


def _n_bytes(dtype: torch.dtype, slot: Slot) -> int:
    return prod(slot.shape) * _dtype_of(slot, dtype).itemsize


def _dtype_of(slot: Slot, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if slot.kind == "bias" else dtype


def read_slot(weights: Weights, slot: Slot) -> Tensor:
    """Return the tensor that fills a slot, fp32, of the slot's shape."""
    if slot.kind == "parameter":
        values = weights.read(slot.ours, slot.index)
        return values if slot.half is None else half_of(values, slot.half).contiguous()
    if slot.kind == "bias":
        assert slot.index is not None
        return weights.read_bias()[slot.index]
    return torch.zeros(slot.shape)


def _read_parts(weights: Weights, slot: Slot) -> Iterator[Tensor]:
    yield read_slot(weights, slot)


def report_written(
    chunks: Iterable[Buffer], on_written: Callable[[int], None] | None, n_written: int = 0
) -> Iterator[Buffer]:
    """Yield chunks; once a chunk is written, report the bytes so far, with n_written from before."""
    for chunk in chunks:
        yield chunk
        n_written += len(chunk)
        if on_written is not None:
            on_written(n_written)


def _write_json(disk: Disk, path: Path, tree: dict[str, Any]) -> None:
    disk.write(path, [(json.dumps(tree, indent=2) + "\n").encode()])


def write_tokenizer(source: Path, directory: Path, *, seq_len: int) -> None:
    """Write the tokenizer's files. Raises ConfigError for a sentencepiece model that cannot be converted."""
    tokenizer, disk, content = load_tokenizer(source), Disk(), source.read_bytes()
    if source.suffix == ".model":
        disk.write(directory / TOKENIZER_MODEL, [content])
        converted = to_hf_tokenizer(source)
        _check_ids(tokenizer, converted)
        content = converted.to_str().encode()
    else:
        converted = HfTokenizer.from_file(str(source))
    if converted.encode("a").ids != [tokenizer.bos_id, *tokenizer.encode("a")]:
        bos = converted.id_to_token(tokenizer.bos_id)
        converted.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
        content = converted.to_str().encode()
    disk.write(directory / TOKENIZER_JSON, [content])
    bos, eos = converted.id_to_token(tokenizer.bos_id), converted.id_to_token(tokenizer.eos_id)
    config: dict[str, Any] = {
        # This class and no other: both versions load it from tokenizer.json alone.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "split_special_tokens": True,  # text never becomes a control id
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    _write_json(disk, directory / TOKENIZER_CONFIG, config)


def read_bpe(source: Path) -> Any:
    """Return a sentencepiece model's ModelProto.

    Raises ConfigError for a model whose ids other programs would not reproduce.
    """
    # Imported here because only this function needs protobuf. Google's module warns when imported twice.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    faults = {
        "model_type": trainer.model_type != trainer.BPE,
        "normalization_rule_name": normalizer.name != "identity",
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "user_defined_symbols": any(piece.type == piece.USER_DEFINED for piece in proto.pieces),
    }
    if wrong := [name for name, is_wrong in faults.items() if is_wrong]:
        raise ConfigError(
            f"{source}: with its {', '.join(wrong)} no other program would give the same ids; use a "
            "tokenizer that `turnout prepare` trained (BPE, identity normalisation, no removed whitespace)"
        )
    return proto


def to_hf_tokenizer(source: Path) -> HfTokenizer:
    """Return a sentencepiece BPE model as one of `tokenizers`. Raises ConfigError for other kinds."""
    proto = read_bpe(source)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    unk = pieces[model.unk_id()]
    converted = HfTokenizer(
        BPE(vocab, _merges(proto), unk_token=unk, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    )
    marks: list[Any] = [normalizers.Replace(" ", SPACE)]
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        marks.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    converted.normalizer = normalizers.Sequence(marks)
    converted.decoder = decoders.Sequence(undo)
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    converted.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return converted


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return every way to join two pieces into a third, in sentencepiece's order of preference.

    sentencepiece joins the neighbours whose union has the highest score, `tokenizers` those whose merge is
    listed first.
    """
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    rank = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL}
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = piece.piece
        ways = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        ways = [way for way in ways if way[0] in rank and way[1] in rank]
        merges += sorted(ways, key=lambda way: (rank[way[0]], rank[way[1]]))
    return merges


def _check_ids(ours: Tokenizer, theirs: HfTokenizer) -> None:
    theirs.encode_special_tokens = True
    spelled = [theirs.id_to_token(i) or "" for i in (ours.bos_id, ours.eos_id)]
    for text in (*PROBES, *(f"a{name}b" for name in spelled)):
        if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text):
            raise ConfigError(
                f"{ours.path}: cannot be exported, because as a tokenizer.json it would give other ids for "
                f"{text!r}; use a tokenizer that `turnout prepare` trained"
            )
    theirs.encode_special_tokens = False
