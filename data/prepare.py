"""Turn raw text into a corpus: a tokenizer, token shards of a train and a validation split, and a manifest.

Contract: the result depends on the plan alone. After a kill at any moment the same call continues, and leaves
byte for byte what an uninterrupted run leaves; no incomplete file has a final name.
"""

import hashlib
import heapq
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from turnout.data.embedded import STDLIB, list_embedded_files
from turnout.data.encode import encode_documents
from turnout.data.errors import DataError
from turnout.data.files import commit
from turnout.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    CorpusManifest,
    SourceSummary,
    SplitSummary,
    corpus_hash_of,
    read_manifest,
    write_manifest,
)
from turnout.data.megatron import ShardInfo
from turnout.data.plan import Settings, adopt_directory, build_plan, check_settings, locked
from turnout.data.shard_pair import PairInfo, ShardPair, find_committed
from turnout.data.sources import Document, Source, iterate_documents
from turnout.data.tokenizer import TRAIN_PIECE_CHARS, Tokenizer, load_tokenizer, split_text, train_tokenizer

SAMPLE_BYTES = 10_000_000
# A constant, because sentencepiece writes the number into its model, and the file's hash should not
# depend on the machine. Its BPE trainer gains little from more threads.
TRAIN_THREADS = 4
REPORT_BYTES = 1 << 20


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a prepare run. total_bytes counts UTF-8 text; None while it is unknown."""

    stage: str
    done_bytes: int
    total_bytes: int | None
    done_documents: int
    done_tokens: int


Report = Callable[[PrepareProgress], None]
ShardsBySplit = dict[str, list[tuple[str, ShardInfo]]]


def prepare_corpus(
    *,
    sources: Sequence[Source],
    out: Path,
    tokenizer: Path | None,
    vocab_size: int | None,
    valid_frac: float,
    shard_tokens: int = 2**26,
    n_workers: int,
    report: Report = lambda progress: None,
) -> CorpusManifest:
    """Write a corpus to `out` and return its manifest. A rerun continues, or finds the corpus finished.

    tokenizer     a .model or .json to use, or None to train one of vocab_size on a sample of the train split
    valid_frac    fraction of the documents held out, by a hash of their text, so duplicates stay together
    shard_tokens  a shard ends with the document that brings it to this many tokens
    n_workers     processes that tokenise; it does not change the result

    Raises DataError for inputs or settings that cannot work, or for an `out` that belongs to something else.
    """
    if n_workers < 1:
        raise DataError(f"n_workers={n_workers} must be at least 1, such as the number of cores")
    settings = Settings(tokenizer, vocab_size, valid_frac, shard_tokens)
    check_settings(sources, settings)
    if tokenizer is not None:
        _check_given_tokenizer(tokenizer, vocab_size)
    plan = build_plan(sources, settings)
    with locked(out):
        adopt_directory(out, plan)
        if (out / MANIFEST_FILE).is_file():
            return read_manifest(out)
        for split in SPLITS:
            (out / split).mkdir(exist_ok=True)
        trained, total_bytes = _provide_tokenizer(sources, out, settings, report)
        work = _Tokenising(out, trained, valid_frac, shard_tokens, n_workers, report, total_bytes)
        summaries = [work.run(source) for source in sources]
        manifest = _to_manifest(sources, summaries, trained, valid_frac)
        write_manifest(out, manifest)
        return manifest


def is_valid(document: Document, valid_frac: float) -> bool:
    """Return whether a document is held out: a function of its text alone, so duplicates stay together."""
    return int.from_bytes(document.digest[:8], "big") < int(valid_frac * 2**64)


def _check_given_tokenizer(path: Path, vocab_size: int | None) -> None:
    found = load_tokenizer(path).vocab_size
    if vocab_size is not None and vocab_size != found:
        raise DataError(
            f"{path}: the vocabulary has {found} tokens, but vocab_size={vocab_size}; "
            f"leave vocab_size out, or set it to {found}"
        )


def _provide_tokenizer(
    sources: Sequence[Source],
    out: Path,
    settings: Settings,
    report: Report,
) -> tuple[Tokenizer, int | None]:
    """Return the corpus's tokenizer, and the bytes of text in all sources if they were counted."""
    given = settings.tokenizer
    path = out / ("tokenizer.model" if given is None else f"tokenizer{given.suffix}")
    total_bytes = None
    if not path.is_file():
        if given is None:
            assert settings.vocab_size is not None
            sample, total_bytes = _sample_train_text(sources, settings.valid_frac, report)
            report(PrepareProgress("train tokenizer", 0, sum(map(len, sample)), 0, 0))
            train_tokenizer(sample, vocab_size=settings.vocab_size, out=path, n_threads=TRAIN_THREADS)
        else:
            tmp = path.with_name(path.name + ".tmp")
            shutil.copyfile(given, tmp)
            commit(tmp, path)
    return load_tokenizer(path), total_bytes


def _sample_train_text(sources: Sequence[Source], valid_frac: float, report: Report) -> tuple[list[str], int]:
    """Sample about SAMPLE_BYTES of the train split in one pass; also return the bytes of all text."""
    sample = _Sample()
    done_bytes = done_documents = reported_bytes = 0
    for source in sources:
        for document in iterate_documents(source):
            done_bytes += document.n_bytes
            done_documents += 1
            if not is_valid(document, valid_frac):
                for piece in split_text(document.text, TRAIN_PIECE_CHARS):
                    sample.offer(piece)
            if done_bytes - reported_bytes >= REPORT_BYTES:
                reported_bytes = done_bytes
                report(PrepareProgress("sample", done_bytes, None, done_documents, 0))
    return sample.pieces(), done_bytes


class _Sample:
    """A uniform sample of text: the pieces with the smallest hashes, whatever their order and number."""

    def __init__(self) -> None:
        # A max-heap by negated hash, so that the piece to drop next is on top.
        self._heap: list[tuple[int, int, str]] = []
        self._keys: set[int] = set()
        self._n_bytes = 0

    def offer(self, piece: str) -> None:
        encoded = piece.encode("utf-8")
        key = -int.from_bytes(hashlib.sha256(encoded).digest(), "big")
        if key in self._keys or (self._n_bytes >= SAMPLE_BYTES and key < self._heap[0][0]):
            return
        heapq.heappush(self._heap, (key, len(encoded), piece))
        self._keys.add(key)
        self._n_bytes += len(encoded)
        while self._n_bytes - self._heap[0][1] >= SAMPLE_BYTES:
            dropped, n_bytes, _ = heapq.heappop(self._heap)
            self._keys.remove(dropped)
            self._n_bytes -= n_bytes

    def pieces(self) -> list[str]:
        return [piece for _, _, piece in sorted(self._heap, reverse=True)]


@dataclass
class _Tokenising:
    """The main pass over the sources, one after another: read, hash, split, encode and write."""

    out: Path
    tokenizer: Tokenizer
    valid_frac: float
    shard_tokens: int
    n_workers: int
    report: Report
    total_bytes: int | None
    done_bytes: int = 0
    done_documents: int = 0
    done_tokens: int = 0
    reported_bytes: int = 0

    def run(self, source: Source) -> tuple[str, ShardsBySplit]:
        """Tokenise one source; return its text hash and its shards by split."""
        committed = find_committed(self.out, source.name, self.tokenizer.sha256)
        documents = iterate_documents(source)
        running = hashlib.sha256()
        n_done = self._replay(source, documents, committed, running)
        pair = self._new_pair(source, len(committed), n_done)
        try:
            for document, ids in encode_documents(
                documents, tokenizer=self.tokenizer, n_workers=self.n_workers
            ):
                running.update(document.digest)
                n_done += 1
                split = "valid" if is_valid(document, self.valid_frac) else "train"
                pair.append(split, ids, n_text_bytes=document.n_bytes)
                self._advance(document, len(ids))
                if pair.n_train_tokens >= self.shard_tokens:
                    committed.append(pair.commit(end_document=n_done, text_sha256=running.hexdigest()))
                    pair = self._new_pair(source, len(committed), n_done)
            if n_done > pair.first_document:
                committed.append(pair.commit(end_document=n_done, text_sha256=running.hexdigest()))
        except BaseException:
            pair.abort()
            raise
        if n_done == 0:
            raise DataError(
                f"source {source.name!r}: {source.path} has no text; give files with at least one document"
            )
        self._report()
        by_split = {split: [shards[split] for shards in committed if split in shards] for split in SPLITS}
        return running.hexdigest(), by_split

    def _new_pair(self, source: Source, number: int, first_document: int) -> ShardPair:
        return ShardPair(
            self.out, source.name, number, first_document=first_document, tokenizer=self.tokenizer
        )

    def _replay(
        self,
        source: Source,
        documents: Iterator[Document],
        committed: list[PairInfo],
        running: "hashlib._Hash",
    ) -> int:
        """Read past the documents that shards already hold, and check that their text is unchanged."""
        n_done = 0
        for shards in committed:
            name, info = shards["train"]
            while n_done < info.end_document and (document := next(documents, None)) is not None:
                running.update(document.digest)
                n_done += 1
                self._advance(document, 0)
            if n_done < info.end_document or running.hexdigest() != info.text_sha256:
                raise DataError(
                    f"source {source.name!r}: documents {info.first_document}..{info.end_document - 1} "
                    f"are no longer the text that {name} was made from; prepare into a new directory"
                )
            self.done_tokens += sum(info.n_tokens for _, info in shards.values())
        return n_done

    def _advance(self, document: Document, n_tokens: int) -> None:
        self.done_bytes += document.n_bytes
        self.done_documents += 1
        self.done_tokens += n_tokens
        if self.done_bytes - self.reported_bytes >= REPORT_BYTES:
            self._report()

    def _report(self) -> None:
        self.reported_bytes = self.done_bytes
        self.report(
            PrepareProgress(
                "tokenize", self.done_bytes, self.total_bytes, self.done_documents, self.done_tokens
            )
        )


def _to_manifest(
    sources: Sequence[Source],
    summaries: Sequence[tuple[str, ShardsBySplit]],
    tokenizer: Tokenizer,
    valid_frac: float,
) -> CorpusManifest:
    splits = [{split: _to_summary(shards) for split, shards in by_split.items()} for _, by_split in summaries]
    n_train_tokens = sum(by_split["train"].n_tokens for by_split in splits)
    for source, by_split in zip(sources, splits, strict=True):
        if by_split["train"].n_documents == 0:
            raise DataError(
                f"source {source.name!r}: none of its {by_split['valid'].n_documents} documents fell into "
                f"the train split with valid_frac={valid_frac}; prepare into a new directory with a smaller "
                "valid_frac, or give more text"
            )
    return CorpusManifest(
        format_version=FORMAT_VERSION,
        corpus_hash=corpus_hash_of([text for text, _ in summaries], [s.weight for s in sources], valid_frac),
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        valid_frac=valid_frac,
        sources=tuple(
            SourceSummary(
                name=source.name,
                weight=by_split["train"].n_tokens / n_train_tokens
                if source.weight is None
                else source.weight,
                text_sha256=text_sha256,
                n_skipped_files=_n_skipped(source),
                splits=by_split,
            )
            for source, (text_sha256, _), by_split in zip(sources, summaries, splits, strict=True)
        ),
    )


def _to_summary(shards: Sequence[tuple[str, ShardInfo]]) -> SplitSummary:
    return SplitSummary(
        shards=tuple(name for name, _ in shards),
        n_documents=sum(info.n_documents for _, info in shards),
        n_tokens=sum(info.n_tokens for _, info in shards),
        n_text_bytes=sum(info.n_text_bytes for _, info in shards),
    )


def _n_skipped(source: Source) -> int:
    return len(list_embedded_files().skipped) if source.path is None and source.name == STDLIB else 0
