"""The exported tokenizer and generated text: in transformers a text gives the ids of training."""

import argparse
import json
import json.decoder
import shlex
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.exports import DecoderWeights, save_weights, variant_config
from tests.models import random_state, tiny_decoder
from tests.unit.data_fixtures import make_texts, write_hf_tokenizer
from turnout.data.tokenizer import load_tokenizer, train_tokenizer
from turnout.launch.commands.export import run_export
from turnout.training.checkpoint.weights import load_decoder
from turnout.training.config.sample import SampleConfig
from turnout.training.errors import ConfigError
from turnout.training.export.huggingface import PROBES
from turnout.training.export.huggingface import write_tokenizer as write_files
from turnout.training.generation.generate import continue_prompts

TEXTS = [*PROBES, "a<s>b</s> <unk>", "\u2581 under\u2581score", *make_texts(30), Path(__file__).read_text()]


def test_sentencepiece_ids_are_the_same(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    # Enough pieces of real text to make the order of merges matter.
    tokenizer = tmp_path_factory.mktemp("rich") / "tokenizer.model"
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, json.decoder, shlex)]
    train_tokenizer(texts, vocab_size=1500, out=tokenizer, n_threads=1)
    write_files(tokenizer, tmp_path, seq_len=9999)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tokenizer)
    for text in (*TEXTS, *texts):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs(text).input_ids == [ours.bos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_tokenizer_json_is_copied_unchanged(tmp_path: Path) -> None:
    """Except that it is made to begin each text with the begin-of-text token, unless it does already."""
    source = write_hf_tokenizer(tmp_path / "own.json", special_tokens=["<|endoftext|>", "<pad>"])
    first, second = tmp_path / "first", tmp_path / "second"
    for origin, out in ((source, first), (first / "tokenizer.json", second)):
        out.mkdir()
        write_files(origin, out, seq_len=9999)
        theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(source)
        for text in [*TEXTS, "a<|endoftext|>b"]:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
            assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)], text
        assert theirs.eos_token_id == ours.eos_id
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    before, after = (json.loads(path.read_bytes()) for path in (source, first / "tokenizer.json"))
    assert (
        before.pop("post_processor") is None and after.pop("post_processor") is not None and before == after
    )


def test_without_a_begin_token_a_text_begins_with_the_end_token(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)), model_prefix=str(tmp_path / "no_bos"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    source = tmp_path / "no_bos.model"
    write_files(source, tmp_path, seq_len=99)
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("the train") == [ours.eos_id, *ours.encode("the train")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram"}, "model_type"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name"),
        ({"user_defined_symbols": ["<|user|>"]}, "user_defined_symbols"),
    ],
)
def test_other_kinds_of_sentencepiece_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    plain = {
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)), model_prefix=str(tmp_path / "other"), **{**plain, **settings}
    )
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=f"with its {message} no other program would give the same ids"):
        write_files(tmp_path / "other.model", out, seq_len=9)


def test_a_dummy_prefix_is_kept(tmp_path: Path) -> None:
    """Llama's own tokenizer.model puts a space in front of every text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (out := tmp_path / "out").mkdir()
    write_files(tmp_path / "llama.model", out, seq_len=9999)
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(tmp_path / "llama.model")
    for text in (text for text in TEXTS if text):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text


@pytest.mark.parametrize("name", ["mixtral-window", "qwen3-gqa", "glm4-all"])
def test_greedy_text_of_64_tokens_is_the_same(name: str, tokenizer: Path, tmp_path: Path) -> None:
    cfg = variant_config(name).model_copy(update={"seq_len": 80})
    decoder = tiny_decoder(cfg, dtype=torch.float32, gain=6.0)
    head = "head.weight"
    weights = DecoderWeights(decoder, random_state(cfg, bias=0.3 if name == "glm4-all" else 0.0), tokenizer)
    weights.parameters[head][2] = 0  # so that no text ends early
    run_export(save_weights(weights, tmp_path / "run"), out := tmp_path / "out", "hf", "float32")
    sample = SampleConfig(prompts=("the train",), n_tokens=64, temperature=0)
    (ours,) = continue_prompts(*_with_tokenizer(weights, tokenizer), sample, seed=0)
    theirs, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    prompt = theirs("the train", return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=64)[0, prompt.input_ids.size(1) :]
    assert len(ids) == 64 and len(set(ids.tolist())) > 5
    assert load_tokenizer(tokenizer).decode(ids.tolist()) == ours
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def _with_tokenizer(weights: DecoderWeights, tokenizer: Path) -> tuple:
    decoder, state = load_decoder(weights)
    return decoder, load_tokenizer(tokenizer), state
