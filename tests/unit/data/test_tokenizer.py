"""Tokenizers: text survives the round trip and never becomes a control id; unusable files are refused."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, processors

from tests.unit.data_fixtures import make_texts, write_hf_tokenizer, write_tokenizer
from turnout.data.errors import DataError
from turnout.data.tokenizer import BOS_ID, EOS_ID, MIN_VOCAB_SIZE, load_tokenizer, split_text, train_tokenizer

HARD_TEXT = "  two  spaces\t\r\n\n\n    x = 1234567\u00a0\u03c0\u4f60\u597d\U0001f600 e\u0301 <0x0A>\x00end "


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "sentencepiece":
        return write_tokenizer(tmp_path)
    return write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["<s>", "</s>", "<|endoftext|>"])


def test_text_comes_back_exactly(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    for text in ["", " ", "\n", HARD_TEXT, *make_texts(5)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch(["a b", "", "c"]) == [tokenizer.encode(t) for t in ("a b", "", "c")]


@pytest.mark.parametrize("spelling", ["<s>", "</s>", "<|endoftext|>", "<unk>"])
def test_text_never_becomes_a_control_id(tokenizer_path: Path, spelling: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = f"a{spelling} {spelling}{spelling}b"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_trained_model_learns_newlines_and_keeps_fixed_control_ids(tmp_path: Path) -> None:
    texts = [*make_texts(30), "end;\n    0417 " * 50]
    train_tokenizer(texts, vocab_size=420, out=tmp_path / "t.model", n_threads=1)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (420, BOS_ID, EOS_ID)
    learned = [tokenizer.decode([i]) for i in range(MIN_VOCAB_SIZE, tokenizer.vocab_size)]
    assert any("\n" in piece and len(piece) > 1 for piece in learned), "newlines are part of the text"
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("0417")) == 4, "digits stay apart"


def test_long_documents_are_split_rather_than_dropped(tmp_path: Path) -> None:
    # The word occurs only in one document, which is far above sentencepiece's limit.
    document = "quokka\n" * 30_000
    train_tokenizer([*make_texts(30), document], vocab_size=400, out=tmp_path / "t.model", n_threads=1)
    assert len(load_tokenizer(tmp_path / "t.model").encode("quokka")) <= 2


def test_training_is_deterministic_and_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{n}.model" for n in range(2)]
    for path in paths:
        train_tokenizer(make_texts(60), vocab_size=300, out=path, n_threads=2)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_tokenizer(paths[0]).sha256 == load_tokenizer(paths[1]).sha256
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.model", "1.model"]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["only a few words"], 5000, r"vocab_size=5000 is more than .* at most \d+, or more text"),
        (["abc"], 100, "vocab_size=100 must be at least 259"),
        ([], 300, "no text to train on"),
        (["".join(map(chr, range(0x4E00, 0x4E80)))], 260, "vocab_size=260 is less than"),
    ],
    ids=["too-large", "below-bytes", "no-text", "too-small"],
)
def test_impossible_training_is_refused_with_a_way_out(
    tmp_path: Path, texts: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(texts, vocab_size=vocab_size, out=tmp_path / "t.model", n_threads=1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_reading_documents_survives_training(tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        yield "fine"
        raise DataError("file.jsonl:2: bad row")

    with pytest.raises(DataError, match="^file.jsonl:2: bad row$"):
        train_tokenizer(documents(), vocab_size=300, out=tmp_path / "t.model", n_threads=1)


def test_end_token_serves_as_bos_where_there_is_none(tmp_path: Path) -> None:
    path = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["<|endoftext|>"])
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_id == tokenizer.eos_id == 0


def test_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    path = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["<pad>"])
    with pytest.raises(DataError, match=r"no end-of-text token among its special tokens \['<pad>'\]"):
        load_tokenizer(path)


def test_truncation_saved_in_the_file_is_ignored(tmp_path: Path) -> None:
    path = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["</s>"])
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(values))
    assert load_tokenizer(path).decode(load_tokenizer(path).encode(HARD_TEXT)) == HARD_TEXT


def test_padding_saved_in_the_file_is_ignored(tmp_path: Path) -> None:
    path = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["</s>"])
    saved = tokenizers.Tokenizer.from_file(str(path))
    saved.enable_padding(pad_id=7, length=20)
    saved.save(str(path))
    tokenizer = load_tokenizer(path)
    for ids, text in zip(tokenizer.encode_batch(["a b", HARD_TEXT]), ["a b", HARD_TEXT], strict=True):
        assert tokenizer.decode(ids) == text


def test_special_tokens_that_the_file_would_add_are_left_to_the_caller(tmp_path: Path) -> None:
    path = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["<s>", "</s>"])
    saved = tokenizers.Tokenizer.from_file(str(path))
    saved.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    saved.save(str(path))
    assert saved.encode("a b").ids[0] == 0, "the file does add them"
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("a b")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == "a b"


def test_the_vocabulary_reaches_the_highest_id(tmp_path: Path) -> None:
    """The embedding has vocab_size rows, so unused ids count too."""
    path = write_hf_tokenizer(tmp_path / "tokenizer.json", special_tokens=["</s>"])
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 350
    path.write_text(json.dumps(values))
    assert len(vocabulary) == 300
    assert load_tokenizer(path).vocab_size == 351


def write_sentencepiece(path: Path, **settings: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_sentencepiece_model_without_bos_begins_documents_with_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "t.model", bos_id=-1, eos_id=1))
    assert tokenizer.bos_id == tokenizer.eos_id == 1


def test_a_sentencepiece_model_that_finds_its_end_in_text_is_refused(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "t.model", user_defined_symbols=["</s>"])
    with pytest.raises(DataError, match=r"t.model: the model has no </s> \(eos\) piece"):
        load_tokenizer(path)


def test_a_file_whose_vocabulary_spells_a_special_token_is_refused(tmp_path: Path) -> None:
    """A word-level model also knows "</s>" as a word."""
    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match="the text '</s>' becomes a control id: a document could end itself"):
        load_tokenizer(tmp_path / "words.json")


@pytest.mark.parametrize("name", ["missing.model", "broken.model", "broken.json", "vocab.txt"])
def test_unusable_files_are_named(tmp_path: Path, name: str) -> None:
    if name != "missing.model":
        (tmp_path / name).write_bytes(b"neither of the two")
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path / name)


def test_split_text_joins_again_and_prefers_newlines() -> None:
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 100 + " y" * 30
    for max_chars in (7, 16, 33, 10_000):
        pieces = list(split_text(text, max_chars))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= max_chars for piece in pieces)
    assert all(piece.endswith("\n") for piece in list(split_text("ab c\n" * 20, 11))[:-1])
    assert list(split_text("", 5)) == []
