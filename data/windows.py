"""Windows for evaluation, by the convention of lm-eval's rolling log-likelihood.

Each text token of a document is scored once; its bos and eos are not scored. Windows predict seq_len tokens
and do not overlap in what they score. The first is preceded by bos, each later one by the token before it. A
last window that is not full is moved back to keep a full context.
Bits per byte = sum of nll in nats / (ln 2 * UTF-8 bytes of the text).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from turnout.data.corpus import Corpus
from turnout.data.errors import DataError
from turnout.data.loader import IGNORE_INDEX
from turnout.data.sources import Source, iterate_documents
from turnout.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    inputs: np.ndarray  # [n] int64, n <= seq_len
    targets: np.ndarray  # [n] int64, IGNORE_INDEX where another window scores the token


@dataclass(frozen=True)
class EvaluationDocument:
    source: str
    ids: np.ndarray  # int64, without bos and eos
    n_bytes: int  # UTF-8 length of the text
    origin: str  # names the document in reports: "file.jsonl:12", or "valid:3" in a corpus


def rolling_windows(ids: Sequence[int] | np.ndarray, *, seq_len: int, bos_id: int) -> list[Window]:
    """Cut the text tokens of one document into windows that score each of them exactly once."""
    stream = np.concatenate([[bos_id], np.asarray(ids, dtype=np.int64)])
    n_tokens = len(stream) - 1
    windows = []
    for first in range(0, n_tokens, seq_len):
        end = min(first + seq_len, n_tokens)
        # stream[j] predicts stream[j + 1]. Only the last window can begin before what it scores; if it is
        # also the first, it is as short as the document.
        begin = max(0, end - seq_len)
        targets = stream[begin + 1 : end + 1].copy()
        targets[: first - begin] = IGNORE_INDEX
        windows.append(Window(stream[begin:end], targets))
    return windows


def text_documents(sources: Iterable[Source], tokenizer: Tokenizer) -> Iterator[EvaluationDocument]:
    """Yield the documents of raw text, round-robin over the sources like `evaluation_documents`."""
    streams = [(source.name, iterate_documents(source)) for source in sources]
    while streams:
        unfinished = []
        for name, stream in streams:
            document = next(stream, None)
            if document is None:
                continue
            ids = np.asarray(tokenizer.encode(document.text), dtype=np.int64)
            yield EvaluationDocument(name, ids, document.n_bytes, document.origin)
            unfinished.append((name, stream))
        streams = unfinished


def evaluation_documents(corpus: Corpus, split: str = "valid") -> Iterator[EvaluationDocument]:
    """Yield the documents of a split, round-robin over the sources, so that the first few cover all of them.

    Raises DataError if the split is empty.
    """
    streams = corpus.split(split)
    if not any(stream.n_documents for stream in streams):
        raise DataError(
            f"{corpus.path}: the {split} split is empty (valid_frac={corpus.manifest.valid_frac}); "
            "prepare a corpus with a larger valid_frac, or more documents"
        )
    tokenizer = corpus.load_tokenizer()
    for number in range(max(stream.n_documents for stream in streams)):
        for stream in streams:
            if number >= stream.n_documents:
                continue
            ids = stream.document(number)[1:-1].astype(np.int64)
            n_bytes = len(tokenizer.decode(ids.tolist()).encode("utf-8"))
            yield EvaluationDocument(stream.name, ids, n_bytes, f"{split}:{number}")
