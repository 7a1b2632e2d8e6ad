"""The tokenizer beside exported weights: what AutoTokenizer of transformers 4 and 5 loads as ours.

Contract: without special tokens it gives the ids of training, also for text that spells a control token. With
them it puts the begin-of-text token in front, as every document of training has it.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE

from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.errors import ConfigError

SPACE = "\u2581"  # what sentencepiece writes for a space
MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
# What every exported tokenizer is tried on, beside its control tokens.
PROBES = (
    "Hello   world\n\n\tx = 1234567  \r\n",
    " leading and trailing  ",
    "",
    "\n\n\n",
    "caf\u00e9 e\u0301 \U0001f600 \u200b a\u00a0b \x00\x01 \ufeff",
    "0x0A <0x0A> def f(x):\n    return x\n",
)


def write_tokenizer(source: Path, directory: Path, *, seq_len: int) -> None:
    """Write the tokenizer's files. Raises ConfigError for a sentencepiece model that cannot be expressed."""
    tokenizer, disk, content = load_tokenizer(source), Disk(), source.read_bytes()
    if source.suffix == ".model":
        disk.write(directory / MODEL, [content])
        converted = to_hf_tokenizer(source)
        _check_ids(tokenizer, converted)
        content = converted.to_str().encode()
    else:
        converted = HfTokenizer.from_file(str(source))
    if converted.encode("a").ids != [tokenizer.bos_id, *tokenizer.encode("a")]:
        _put_in_front(converted, tokenizer.bos_id)
        content = converted.to_str().encode()
    disk.write(directory / JSON, [content])
    bos, eos = converted.id_to_token(tokenizer.bos_id), converted.id_to_token(tokenizer.eos_id)
    config: dict[str, Any] = {
        # This class and no other: it is what both versions load from tokenizer.json alone.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "split_special_tokens": True,  # text never becomes a control id
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    disk.write(directory / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])


def _put_in_front(tokenizer: HfTokenizer, bos_id: int) -> None:
    bos = tokenizer.id_to_token(bos_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )


def read_bpe(source: Path) -> Any:
    """Return a sentencepiece model's ModelProto. Raises ConfigError where others cannot tokenise alike."""
    # Imported here because only this needs protobuf; Google's module warns where it is imported twice.
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
            f"{source}: with its {', '.join(wrong)} no other program would give the same ids; what `turnout "
            "prepare` trains can be exported (BPE, identity normalisation, no removed whitespace)"
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
    """Return every way to join two pieces into a third, in the order in which sentencepiece prefers them.

    It joins the neighbours whose union has the highest score; `tokenizers` those of the lowest rank.
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
                f"{ours.path}: written as a tokenizer.json it gives other ids for {text!r}; it is of a kind "
                "that cannot be exported"
            )
    theirs.encode_special_tokens = False
