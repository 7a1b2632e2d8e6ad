"""Windows for evaluation against lm-eval's convention, and the documents they are cut from."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.errors import DataError
from turnout.data.loader import IGNORE_INDEX
from turnout.data.windows import evaluation_documents, rolling_windows

BOS = 1


def convention(ids: list[int], max_seq_len: int) -> list[tuple[list[int], list[int]]]:
    """The rolling windows with context 1 as lm-eval defines them: (input tokens, tokens to predict)."""
    if not ids:
        return []
    first = min(max_seq_len, len(ids))
    windows = [([BOS, *ids[: first - 1]], ids[:first])]
    predicted = first
    while predicted < len(ids):
        n_new = min(len(ids) - predicted, max_seq_len)
        end = predicted + n_new
        windows.append((ids[end - max_seq_len - 1 : end - 1], ids[end - n_new : end]))
        predicted += n_new
    return windows


@pytest.mark.parametrize("seq_len", [1, 2, 7, 37, 100])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 6, 7, 8, 14, 36, 37, 38, 101])
def test_windows_follow_the_convention(seq_len: int, n_tokens: int) -> None:
    ids = list(range(10, 10 + n_tokens))
    windows = rolling_windows(ids, seq_len=seq_len, bos_id=BOS)
    expected = convention(ids, seq_len)
    assert len(windows) == len(expected)
    for window, (inputs, new) in zip(windows, expected, strict=True):
        assert window.inputs.tolist() == inputs
        assert window.targets.tolist() == [IGNORE_INDEX] * (len(inputs) - len(new)) + new
        assert len(window.inputs) <= seq_len
    scored = [t for window in windows for t in window.targets.tolist() if t != IGNORE_INDEX]
    assert scored == ids, "each token is scored once, in order"


def test_a_target_is_the_token_after_its_input() -> None:
    for window in rolling_windows(np.arange(10, 60), seq_len=16, bos_id=9):
        counted = window.targets != IGNORE_INDEX
        assert (window.targets[counted] == window.inputs[counted] + 1).all()


def test_evaluation_documents_are_the_held_out_texts(tmp_path: Path) -> None:
    texts = {"a": [*make_texts(40), "caf\u00e9 \u4f60\u597d"], "b": make_texts(20, seed=2)}
    corpus = make_corpus(tmp_path, texts, valid_frac=0.4)
    tokenizer = corpus.load_tokenizer()
    found = list(evaluation_documents(corpus)) + list(evaluation_documents(corpus, "train"))
    for name, originals in texts.items():
        mine = {tokenizer.decode(d.ids.tolist()): d.n_bytes for d in found if d.source == name}
        assert mine == {text: len(text.encode()) for text in originals}
    assert all(tokenizer.bos_id not in d.ids and tokenizer.eos_id not in d.ids for d in found)


def test_the_first_few_documents_cover_all_sources(tmp_path: Path) -> None:
    corpus = make_corpus(
        tmp_path, {"a": make_texts(5), "b": make_texts(3, seed=2), "c": make_texts(1, seed=3)}
    )
    found = [(document.source, document.origin) for document in evaluation_documents(corpus, "train")]
    round_robin = [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("a", 4)]
    assert found == [(source, f"train:{number}") for source, number in round_robin]


def test_an_empty_split_is_refused_when_it_is_evaluated(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": make_texts(5)}, valid_frac=0.0)
    with pytest.raises(DataError, match=r"the valid split is empty \(valid_frac=0.0\)"):
        next(evaluation_documents(corpus))
