"""Streamed text: no half characters, no half stop strings, and nothing is lost."""

import io
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.unit.data_fixtures import make_texts, write_hf_tokenizer, write_tokenizer
from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.training.generation.text_stream import CONTEXT_TOKENS, TextStream

TEXT = "the train \u20ac5 tr\u00e4gt \u65e5\u672c, \U0001f682\U0001f682\U0001f682 takes  its\n\town track\n"


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = Path(tmp_path_factory.mktemp("tokenizer"))
    if request.param == "sentencepiece":
        return load_tokenizer(write_tokenizer(directory))
    return load_tokenizer(write_hf_tokenizer(directory / "tokenizer.json", special_tokens=["</s>"]))


def pieces(tokenizer: Tokenizer, ids: Sequence[int], *stop: str, prompt: str = "a train") -> list[str]:
    stream = TextStream(tokenizer, [tokenizer.bos_id, *tokenizer.encode(prompt)], stop)
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.is_stopped:
            return out
    return [*out, stream.finish()]


def until_stop(text: str, *stop: str) -> str:
    """Slow twin: read character by character until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_characters_are_whole_and_nothing_is_lost(tokenizer: Tokenizer) -> None:
    text = TEXT * 5
    ids = tokenizer.encode(text)
    assert len(ids) > 8 * CONTEXT_TOKENS, "the context has to be cut"
    out = pieces(tokenizer, ids)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)
    assert "" in out, "no character took more than one token, so this proves nothing"
    assert sum(piece != "" for piece in out) > len(text) / 8, "text is shown early"


def test_a_token_may_end_inside_a_character(tmp_path: Path) -> None:
    """This byte-level tokenizer joins a space to the first byte of the next character."""
    trained = HfTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1 + len(alphabet) + 1,  # the end of text, all bytes, and one merge
        special_tokens=["</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    text = " \u20ac \u2192 \u2260 \u2713" * 10
    trained.train_from_iterator([text], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode(text)
    assert len(ids) == 3 * 40 > 8 * CONTEXT_TOKENS and tokenizer.decode(ids[:1]) == " \ufffd"
    out = pieces(tokenizer, ids)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_invalid_bytes_are_shown_once_they_are_certain(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\u20ac")
    assert len(ids) == 3
    assert "".join(pieces(tokenizer, [*ids, ids[0]])) == "\u20ac"
    broken = pieces(tokenizer, [*ids[:2], *tokenizer.encode("xy")])
    assert broken[:2] == ["", ""] and "".join(broken).lstrip("\ufffd") == "xy"


@pytest.mark.parametrize(
    "stop",
    [
        ("train",),
        ("\n\t",),
        ("\u672c, \U0001f682",),
        ("t",),
        ("zebra",),
        ("track\nX", "own tr"),
        ("ak", "take"),
        ("train", "ra"),
    ],
    ids=ascii,
)
def test_a_stop_string_ends_the_text_before_it(stop: tuple[str, ...], tokenizer: Tokenizer) -> None:
    out = pieces(tokenizer, tokenizer.encode(TEXT), *stop)
    assert "".join(out) == until_stop(TEXT, *stop)


def test_no_piece_shows_the_beginning_of_a_stop_string(tokenizer: Tokenizer) -> None:
    out = pieces(tokenizer, tokenizer.encode("ab STO STOP"), "STOP")
    assert "".join(out) == "ab STO "
    shown = ["".join(out[: i + 1]) for i in range(len(out))]
    assert not any(text.endswith(("S", "ST", "STO")) for text in shown)
    assert "".join(pieces(tokenizer, tokenizer.encode("ab STO"), "STOP")) == "ab STO"


def test_stop_strings_at_random(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    n_stopped = 0
    for _ in range(300):
        text = "".join(rng.choices("ab\u20ac\n", k=12))
        stop = tuple("".join(rng.choices("ab\u20ac\n", k=rng.randint(1, 4))) for _ in range(2))
        want = until_stop(text, *stop)
        assert "".join(pieces(tokenizer, tokenizer.encode(text), *stop)) == want, (text, stop)
        n_stopped += want != text
    assert 100 < n_stopped < 300


def test_a_space_between_prompt_and_text_is_kept(tmp_path: Path) -> None:
    """Llama's tokenizer.model adds a space before a text, and drops it where a text begins."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    ids = tokenizer.encode("takes its own")
    assert tokenizer.decode(ids) == "takes its own"
    assert "".join(pieces(tokenizer, ids, prompt="the train")) == " takes its own"
    assert "".join(pieces(tokenizer, ids, prompt="")) == "takes its own"
