"""Exported GGUF files: what the gguf package reads back is our model, in fp32, bf16 and Q8_0."""

from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch

from tests.exports import VARIANTS, save_weights, variant_config, variant_weights
from tests.unit.data_fixtures import make_texts, write_hf_tokenizer, write_tokenizer
from turnout.launch.commands.export import run_export
from turnout.training.errors import CheckpointError, ConfigError, ExportError
from turnout.training.export.gate import has_llama_cpp
from turnout.training.export.gguf_file import (
    GGUF_FILE,
    KINDS,
    Kind,
    check_gguf,
    read_back_gguf,
    to_stored,
    write_gguf,
)
from turnout.training.export.huggingface import write_huggingface

LOADABLE = [
    "mixtral-gqa",
    "mixtral-mha-tied",
    "mixtral-12-experts",
    "qwen3-gqa",
    "qwen3-mha-tied",
    "glm4-plain",
    "glm4-all",
    "glm4-qk-norm-mha-tied",
    "glm4-not-normalised",
]


@pytest.mark.parametrize("name", LOADABLE)
def test_every_tensor_reads_back(
    name: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dtype = ["float32", "bfloat16", "q8_0"][LOADABLE.index(name) % 3]
    checkpoint = save_weights(variant_weights(name, tokenizer), tmp_path / "run")
    run_export(checkpoint, out := tmp_path / "out", "gguf", dtype)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", GGUF_FILE]
    said = capsys.readouterr().out
    assert ("computes the same" in said) if has_llama_cpp() else ("llama.cpp is not installed" in said)


def test_an_impossible_export_is_refused_before_anything_is_verified(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_weights(variant_weights("qwen3-window", tokenizer), tmp_path / "run")
    for place in (checkpoint, tmp_path / "run"):
        with pytest.raises(ConfigError, match="has no sliding window"):
            run_export(place, tmp_path / "out", "gguf", "float32")
        assert "intact" not in capsys.readouterr().err
    (checkpoint / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="tokenizer.model"):
        run_export(checkpoint, tmp_path / "out", "gguf", "float32")


def test_a_hugging_face_directory_can_be_exported_too(tokenizer: Path, tmp_path: Path) -> None:
    weights = variant_weights("glm4-qk-norm-mha-tied", tokenizer)
    (source := tmp_path / "hf").mkdir()
    write_huggingface(weights, "glm4_moe", source, dtype=torch.float32)
    run_export(source, tmp_path / "out", "gguf", "float32")
    path = tmp_path / "out" / GGUF_FILE
    assert "all 51 tensors" in read_back_gguf(path, weights, "glm4_moe", Kind.F32)


def test_rows_of_heads_are_where_ggml_expects_them(tokenizer: Path, tmp_path: Path) -> None:
    """RoPE on neighbouring rows of the file's q equals our RoPE on our q: row by row."""
    weights = variant_weights("mixtral-gqa", tokenizer)
    path = write_gguf(weights, "mixtral", tmp_path, kind=Kind.F32)
    (found,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    theirs = torch.from_numpy(found.data.copy()).view(4, 24, 64)
    ours = weights.read("blocks.1.attn.q.weight").view(4, 24, 64)
    for i in range(12):
        assert torch.equal(theirs[:, 2 * i], ours[:, i])
        assert torch.equal(theirs[:, 2 * i + 1], ours[:, i + 12])


def test_q8_0_is_close_and_bf16_closer(tokenizer: Path) -> None:
    values = variant_weights("mixtral-gqa", tokenizer).read("blocks.0.moe.experts.down")
    errors = [
        float((to_stored(KINDS[dtype], "x", values) - values).norm() / values.norm())
        for dtype in ("float32", "bfloat16", "q8_0")
    ]
    assert errors[0] == 0 and 0 < errors[1] < 3e-3 < errors[2] < 9e-3


def test_tokens_are_those_of_sentencepiece(tokenizer: Path, tmp_path: Path) -> None:
    weights = variant_weights("glm4-plain", tokenizer)
    reader = gguf.GGUFReader(write_gguf(weights, "glm4_moe", tmp_path, kind=Kind.F32))
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    assert tokens is not None and kinds is not None
    assert len(tokens.contents()) == weights.cfg.vocab_size
    assert tokens.contents()[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert kinds.contents()[:4] == [2, 3, 3, 6]


def test_pieces_keep_their_scores_and_unused_pieces_come_last(tmp_path: Path) -> None:
    """llama.cpp joins the neighbours whose union has the highest score."""
    weights = variant_weights("mixtral-gqa", write_tokenizer(tmp_path, vocab_size=295))
    model = sentencepiece.SentencePieceProcessor(model_file=str(weights.tokenizer_path))
    reader = gguf.GGUFReader(write_gguf(weights, "mixtral", tmp_path, kind=Kind.F32))
    tokens, scores, kinds = (
        reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    assert tokens is not None and scores is not None and kinds is not None
    assert scores.contents()[:295] == [model.get_score(i) for i in range(295)]
    assert len(set(scores.contents()[:295])) > 20, "enough different scores to show the order of merges"
    assert len(scores.contents()) == 300 and max(scores.contents()[295:]) < min(scores.contents()[:295])
    assert tokens.contents()[294:297] == [model.id_to_piece(294), "[UNUSED295]", "[UNUSED296]"]
    assert set(kinds.contents()[295:]) == {5}


@pytest.mark.parametrize("has_prefix", [False, True], ids=["ours", "as Llama's"])
def test_a_space_is_prepended_where_the_tokenizer_does(has_prefix: bool, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)), model_prefix=str(tmp_path / "other"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=has_prefix, minloglevel=2,
    )  # fmt: skip
    weights = variant_weights("mixtral-gqa", tmp_path / "other.model")
    reader = gguf.GGUFReader(write_gguf(weights, "mixtral", tmp_path, kind=Kind.F32))
    field = reader.get_field("tokenizer.ggml.add_space_prefix")
    assert field is not None and field.contents() is has_prefix


@pytest.mark.parametrize("broken", ["experts swapped", "rows not reordered", "layers swapped"])
def test_read_back_finds_what_is_broken(broken: str, tokenizer: Path, tmp_path: Path) -> None:
    true = variant_weights("mixtral-gqa", tokenizer)
    false = variant_weights("mixtral-gqa", tokenizer)
    if broken == "experts swapped":
        gate_up = false.parameters["blocks.1.moe.experts.gate_up"]
        false.parameters["blocks.1.moe.experts.gate_up"] = gate_up[[0, 2, 1, 3, 4, 5]]
    elif broken == "rows not reordered":
        k = false.parameters["blocks.0.attn.k.weight"].view(2, 12, 2, 64)
        false.parameters["blocks.0.attn.k.weight"] = k.transpose(1, 2).reshape(48, 64)
    else:
        one, other = "blocks.0.attn_norm.weight", "blocks.1.attn_norm.weight"
        false.parameters[one], false.parameters[other] = false.parameters[other], false.parameters[one]
    path = write_gguf(false, "mixtral", tmp_path, kind=Kind.BF16)
    with pytest.raises(ExportError, match="is not the tensor that was exported: largest difference"):
        read_back_gguf(path, true, "mixtral", Kind.BF16)


@pytest.mark.parametrize(
    "name", ["blocks.1.moe.experts.down", "blocks.2.attn.o.weight", "blocks.0.attn_norm.weight"]
)
def test_read_back_finds_one_bit(name: str, tokenizer: Path, tmp_path: Path) -> None:
    true, false = variant_weights("mixtral-gqa", tokenizer), variant_weights("mixtral-gqa", tokenizer)
    flat = false.parameters[name].view(-1)
    flat[5] = flat[5].nextafter(torch.tensor(torch.inf))
    path = write_gguf(false, "mixtral", tmp_path, kind=Kind.F32)
    with pytest.raises(ExportError, match="is not the tensor that was exported: largest difference"):
        read_back_gguf(path, true, "mixtral", Kind.F32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral-window", "sliding_window=none"),
        ("qwen3-dense-not-normalised", "router.normalize=true.*n_dense_layers=0"),
    ],
)
def test_a_model_that_llama_cpp_cannot_load_is_refused(name: str, message: str, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_gguf(variant_config(name), VARIANTS[name][0], Kind.F32, tokenizer)


def test_a_tokenizer_json_and_rows_of_half_a_block_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    cfg = variant_config("mixtral-gqa")
    other = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["<s>", "</s>"])
    with pytest.raises(ConfigError, match="pre-tokenizers of published"):
        check_gguf(cfg, "mixtral", Kind.F32, other)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)), model_prefix=str(tmp_path / "other"), vocab_size=300,
        model_type="unigram", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="with its model_type, normalization_rule_name, remove_extra"):
        check_gguf(cfg, "mixtral", Kind.F32, tmp_path / "other.model")
    odd = cfg.model_copy(update={"d_expert": 40})
    with pytest.raises(ConfigError, match="d_expert=40 is not; use --dtype bfloat16"):
        check_gguf(odd, "mixtral", Kind.Q8_0, tokenizer)
