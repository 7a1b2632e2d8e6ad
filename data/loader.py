"""Batches of packed documents: `batch(step)` is a pure function of (corpus, seed, step).

There is no position to save and no shuffle buffer to refill. A rank asks for its rows, and only those are
read, so the number of ranks, micro-batches or threads cannot change what a step sees.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from turnout.data.corpus import Corpus, TokenStream
from turnout.data.errors import DataError
from turnout.data.order import Blend, sample_ids

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
# A sample's id is its source's number, shifted by this many bits, plus its index in the source.
SOURCE_BIT = 48

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens. Position j of targets is the token that follows position j of tokens."""

    tokens: "Tensor"  # [B, S] int64
    targets: "Tensor"  # [B, S] int64, IGNORE_INDEX where the next token begins another document
    doc_ids: "Tensor"  # [B, S] int64, from 0 in each sequence, one more at each document's start
    sample_ids: "Tensor"  # [B] int64, source_id << 48 | index of the window in its source


class Loader:
    """Cut each source's stream into windows and serve them in the order of `data.order`.

    Window i of a source is tokens [i*S, i*S + S + 1): the first S are inputs, the last S are targets, so each
    token of the stream but the first is a target once per epoch. The tail that fills no window is left out.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        batch_seqs: int,
        seed: int,
        attend_across_documents: bool = False,
    ) -> None:
        self.seq_len, self.batch_seqs, self.seed = seq_len, batch_seqs, seed
        self._attend_across_documents = attend_across_documents
        self._streams = corpus.split("train")
        self.n_samples_per_source = [max(0, (stream.n_tokens - 1) // seq_len) for stream in self._streams]
        for stream, n_samples in zip(self._streams, self.n_samples_per_source, strict=True):
            if n_samples < 1:
                raise DataError(
                    f"{corpus.path}: source {stream.name!r} has {stream.n_tokens} train tokens, fewer than "
                    f"one window of seq_len={seq_len} + 1; shorten seq_len, or merge the source with another"
                )
        if sum(self.n_samples_per_source) < batch_seqs:
            raise DataError(
                f"{corpus.path}: the train split has {sum(self.n_samples_per_source)} windows of "
                f"seq_len={seq_len}, fewer than the {batch_seqs} sequences of one batch; "
                "use a smaller batch, a shorter seq_len or more text"
            )
        self._blend = Blend([stream.weight for stream in self._streams])

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Return the batch of one step, or only the chosen rows."""
        # Imported here because torch takes a second to import, and checking a corpus does not need it.
        import torch

        windows, starts, ids = self.windows(step, rows)
        targets = np.where(starts[:, 1:] == 1, IGNORE_INDEX, windows[:, 1:])
        return Batch(
            tokens=torch.from_numpy(windows[:, :-1].copy()),
            targets=torch.from_numpy(targets),
            doc_ids=torch.from_numpy(np.cumsum(starts[:, :-1], axis=1)),
            sample_ids=torch.from_numpy(ids),
        )

    def windows(self, step: int, rows: slice | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the chosen rows of a step's batch as numpy arrays, int64.

        tokens [B, S + 1], inputs and the last target; starts [B, S + 1], 1 where a document starts after the
        first token; sample ids [B].
        """
        source_ids, sample_idx, _ = sample_ids(
            step,
            n_samples_per_source=self.n_samples_per_source,
            blend=self._blend,
            batch_seqs=self.batch_seqs,
            seed=self.seed,
        )
        chosen = slice(None) if rows is None else rows
        source_ids, sample_idx = source_ids[chosen], sample_idx[chosen]
        n_rows = len(source_ids)
        windows = np.empty((n_rows, self.seq_len + 1), dtype=np.int64)
        starts = np.zeros((n_rows, self.seq_len + 1), dtype=np.int64)
        for row, (source_id, index) in enumerate(zip(source_ids.tolist(), sample_idx.tolist(), strict=True)):
            self._read_window(self._streams[source_id], index, windows[row], starts[row])
        return windows, starts, source_ids << SOURCE_BIT | sample_idx

    def _read_window(self, stream: TokenStream, index: int, window: np.ndarray, starts: np.ndarray) -> None:
        """Fill one row: its tokens, and a 1 where a document starts after the first token."""
        begin = index * self.seq_len
        window[:] = stream.read(begin, self.seq_len + 1)
        if not self._attend_across_documents:
            starts[stream.document_starts_within(begin + 1, self.seq_len) - begin] = 1


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class Prefetcher(Generic[T]):
    """Compute load(step) ahead of its use on a background thread.

    Iterating yields (step, load(step)) for each step in order, whatever the timing: one thread, one queue.
    An exception of load is raised where the step would have been consumed.
    """

    def __init__(self, load: Callable[[int], T], start_step: int, stop_step: int, depth: int = 2) -> None:
        assert depth >= 1, "a queue of depth 0 would be unbounded"
        self._load, self._steps = load, range(start_step, stop_step)
        self._ready: queue.Queue[T | _Failure] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, T]]:
        for step in self._steps:
            if self._closed.is_set():
                return
            value = self._ready.get()
            if isinstance(value, _Failure):
                self.close()
                raise value.error
            yield step, value

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it; a load that has begun is finished first."""
        self._closed.set()
        # Emptying the queue frees a thread that waits to put its value, so that it sees it should stop.
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self) -> None:
        for step in self._steps:
            if self._closed.is_set():
                return
            try:
                value: T | _Failure = self._load(step)
            except BaseException as err:  # raised again where the value is consumed
                value = _Failure(err)
            self._ready.put(value)
            if isinstance(value, _Failure):
                return
