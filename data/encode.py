"""Tokenise a stream of documents on all cores, in order, with a bounded number of batches in flight.

Contract: the result does not depend on the number of workers. This module must stay light to import:
every worker process imports it.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from turnout.data.sources import Document
from turnout.data.tokenizer import Tokenizer, load_tokenizer, split_text

# Longer documents are encoded in pieces, so memory stays bounded and one huge file keeps every core busy.
# A cut, one per million characters, can split what would have been one token.
PIECE_CHARS = 1 << 20
BATCH_CHARS = 1 << 20
BATCHES_PER_WORKER = 3


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
    workers = _Workers(n_workers, tokenizer.path)
    waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, workers.submit([piece.text for piece in batch])))
            if len(waiting) >= BATCHES_PER_WORKER * n_workers:
                yield _next_of(waiting)
        while waiting:
            yield _next_of(waiting)
    finally:
        workers.close()


def _next_of(
    waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]],
) -> tuple[list[_Piece], list[np.ndarray]]:
    batch, future = waiting.popleft()
    return batch, future.result()


def _encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]


class _Workers:
    """Processes that tokenise, each with its own pipe, which threads of this process write and read.

    Not a ProcessPoolExecutor: it hangs if a worker is killed while it sends an answer.
    """

    def __init__(self, n_workers: int, tokenizer_path: Path) -> None:
        # Spawned, not forked: the parent has threads of torch, pyarrow and perhaps a progress bar.
        context = get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(n_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, tokenizer_path), daemon=True)
            process.start()
            theirs.close()  # so that reading raises EOFError once the worker has died
            self._processes.append(process)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(n_workers)

    def submit(self, texts: list[str]) -> Future[list[np.ndarray]]:
        return self._threads.submit(self._ask, texts)

    def _ask(self, texts: list[str]) -> list[np.ndarray]:
        worker = self._idle.get()
        try:
            worker.send(texts)
            answer: list[np.ndarray] | Exception = worker.recv()
        except (EOFError, OSError) as err:
            raise OSError(
                f"one of {len(self._processes)} tokenising workers died, most often for lack of memory; "
                "run the same command with fewer workers, it continues where it stopped"
            ) from err
        finally:
            self._idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Stop the workers, even those that are still busy."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._threads.shutdown()


def _serve(parent: Connection, tokenizer_path: Path) -> None:
    """Answer each list of texts with its ids or with the exception, until the parent closes the pipe."""
    tokenizer = _start_worker(tokenizer_path)
    while True:
        try:
            texts = parent.recv()
        except EOFError:
            return
        try:
            answer: list[np.ndarray] | Exception = _encode_texts(tokenizer, texts)
        except Exception as err:  # the parent raises it
            answer = err
        parent.send(answer)


def _start_worker(tokenizer_path: Path) -> Tokenizer:
    # Ctrl-C reaches the whole process group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The workers already use every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    return load_tokenizer(tokenizer_path)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
