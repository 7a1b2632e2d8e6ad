"""Tokenise a stream of documents on all cores, in order, with a bounded number of batches in flight.

Contract: the result does not depend on the number of workers. This module must stay light to import:
each worker process imports it anew.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

from data.sources import Document
from data.tokenizer import Tokenizer, load_tokenizer, split_text

# Longer documents are encoded in pieces: memory stays bounded, and one huge file keeps every core busy.
# A merge across such a cut, once in a million characters, is lost.
PIECE_CHARS = 1 << 20
BATCH_CHARS = 1 << 20
BATCHES_PER_WORKER = 3

# The tokenizer of a worker process, which serves one corpus and then ends.
_worker_tokenizer: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    document: Document
    is_last: bool


def encode_documents(
    documents: Iterable[Document], *, tokenizer: Tokenizer, n_workers: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield each document with its `[bos, *ids, eos]`, int32, in the order given."""
    parts: list[np.ndarray] = []
    bos, eos = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    for pieces, piece_ids in _encode_batches(_batches(documents), tokenizer, n_workers):
        for piece, ids in zip(pieces, piece_ids, strict=True):
            parts.append(ids)
            if piece.is_last:
                yield piece.document, np.concatenate([bos, *parts, eos])
                parts = []


def _batches(documents: Iterable[Document]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    n_chars = 0
    for document in documents:
        texts = list(split_text(document.text, PIECE_CHARS))
        for number, text in enumerate(texts, start=1):
            batch.append(_Piece(text, document, is_last=number == len(texts)))
            n_chars += len(text)
            if n_chars >= BATCH_CHARS:
                yield batch
                batch, n_chars = [], 0
    if batch:
        yield batch


def _encode_batches(
    batches: Iterable[list[_Piece]], tokenizer: Tokenizer, n_workers: int
) -> Iterator[tuple[list[_Piece], list[np.ndarray]]]:
    if n_workers == 1:
        for batch in batches:
            yield batch, _encode_texts(tokenizer, [piece.text for piece in batch])
        return
    # Spawned, not forked: the parent has the threads of torch, pyarrow and perhaps a progress bar.
    # An executor, not a Pool, which waits for ever when one of its workers is killed.
    with ProcessPoolExecutor(
        n_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer.path,)
    ) as pool:
        waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode_in_worker, [piece.text for piece in batch])))
                if len(waiting) >= BATCHES_PER_WORKER * n_workers:
                    yield _next_of(waiting)
            while waiting:
                yield _next_of(waiting)
        except BrokenProcessPool as err:
            raise OSError(
                f"a tokenising worker of {n_workers} died, most often for lack of memory; "
                "run the same command again with fewer workers, it continues where it stopped"
            ) from err
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _next_of(
    waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]],
) -> tuple[list[_Piece], list[np.ndarray]]:
    batch, future = waiting.popleft()
    return batch, future.result()


def _encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    assert _worker_tokenizer is not None
    return _encode_texts(_worker_tokenizer, texts)


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    # Ctrl-C reaches the whole process group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool already has a process for each core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
