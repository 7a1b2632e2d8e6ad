"""`turnout evaluate`: loss, perplexity and bits per byte of texts, by document, by source and in total."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.table import Table

from turnout.data.corpus import Corpus, open_corpus
from turnout.data.errors import DataError
from turnout.data.files import write_atomically
from turnout.data.sources import Source, list_files
from turnout.data.windows import EvaluationDocument, evaluation_documents, text_documents
from turnout.launch.arguments import check_at_least, check_out_file, parse_sources
from turnout.launch.console import LiveBar, print_table
from turnout.launch.models import DType, LoadedModel, load_model
from turnout.training.errors import ConfigError, printable
from turnout.training.evaluation.held_out import Evaluation, score_documents

CONVENTION = (
    "each document is scored alone, after <bos>, each of its tokens once, in windows of seq_len tokens; "
    "<eos> is not scored; bits per byte of UTF-8 text"
)
ZERO = Evaluation(0.0, 0, 0, 0)


@dataclass(frozen=True)
class ScoredDocument:
    """The result of a document, without its tokens."""

    source: str
    origin: str
    sums: Evaluation


def run_evaluate(
    path: Path,
    texts: Sequence[str],
    *,
    corpus: Path | None,
    split: str | None,
    text_field: str | None,
    max_documents: int | None,
    microbatch_seqs: int,
    dtype: DType,
    out: Path | None,
) -> None:
    """Score texts or a corpus and print a table by source. Raises ConfigError, DataError, CheckpointError."""
    check_one_input(texts, corpus, split, text_field)
    check_at_least(1, {"--max-documents": max_documents, "--microbatch-seqs": microbatch_seqs})
    check_out_file(out, (".json", ".jsonl"))
    sources = parse_sources(texts, (), text_field or "text")
    for source in sources:  # fail before the model is read, which can take minutes
        list_files(source)
    opened = None if corpus is None else open_corpus(corpus, verify="size")
    model = load_model(path, dtype=dtype, corpus=opened)
    documents = islice(documents_of(opened, split, sources, model), max_documents)
    scored = list(
        _scored_with_bar(model, documents, microbatch_seqs, n_documents_of(opened, split, max_documents))
    )
    if not any(document.sums.n_tokens for document in scored):
        raise DataError(f"{corpus or ', '.join(texts)}: holds no text to evaluate; name other files")
    by_source = sums_by_source(scored)
    total = sum(by_source.values(), ZERO)
    if out is not None:  # before anything is printed, because stdout may be a closed pipe
        head = {"model": str(model.place), "dtype": dtype, "convention": CONVENTION}
        _write_results(out, head, scored, by_source, total)
    _print_table(by_source, total)
    if out is not None:
        print(f"by document: {out}")


def check_one_input(
    texts: Sequence[str], corpus: Path | None, split: str | None, text_field: str | None
) -> None:
    """Raise ConfigError unless there are either texts or a corpus, and every option has an effect."""
    if bool(texts) == (corpus is not None):
        raise ConfigError("name texts as PATH or NAME=PATH, or a --corpus, but not both")
    if split is not None and corpus is None:
        raise ConfigError(f"--split {split} has no effect without --corpus; drop it")
    if text_field is not None and corpus is not None:
        raise ConfigError(f"--text-field {text_field} has no effect with --corpus; drop it")


def documents_of(
    corpus: Corpus | None, split: str | None, sources: Sequence[Source], model: LoadedModel
) -> Iterator[EvaluationDocument]:
    if corpus is not None:
        return evaluation_documents(corpus, split or "valid")
    return text_documents(sources, model.tokenizer)


def sums_by_source(scored: Iterable[ScoredDocument]) -> dict[str, Evaluation]:
    sums: dict[str, Evaluation] = {}
    for document in scored:
        sums[document.source] = sums.get(document.source, ZERO) + document.sums
    return sums


def n_documents_of(corpus: Corpus | None, split: str | None, max_documents: int | None) -> int | None:
    """Return how many documents will be read, or None if that is unknown before reading.

    For texts max_documents is the best guess: there may be fewer.
    """
    if corpus is None:
        return max_documents
    n_documents = sum(stream.n_documents for stream in corpus.split(split or "valid"))
    return n_documents if max_documents is None else min(n_documents, max_documents)


def _scored_with_bar(
    model: LoadedModel, documents: Iterable[EvaluationDocument], microbatch_seqs: int, n_expected: int | None
) -> Iterator[ScoredDocument]:
    scores = score_documents(
        model.decoder,
        model.state,
        documents,
        bos_id=model.tokenizer.bos_id,
        microbatch_seqs=microbatch_seqs,
    )
    with LiveBar("evaluating", n_expected) as bar:
        for n_done, (document, sums) in enumerate(scores, start=1):
            yield ScoredDocument(document.source, document.origin, sums)
            bar.update(n_done, f"evaluating: {n_done:,} documents")


def _print_table(by_source: dict[str, Evaluation], total: Evaluation) -> None:
    table = Table("source")
    for column in ("documents", "tokens", "bytes", "loss (nats/token)", "perplexity", "bits/byte"):
        table.add_column(column, justify="right")
    for name, sums in [*by_source.items(), ("total", total)]:
        counts = (f"{n:,}" for n in (sums.n_documents, sums.n_tokens, sums.n_bytes))
        table.add_row(
            printable(name),
            *counts,
            f"{sums.loss:.4f}",
            f"{sums.perplexity:.4g}",
            f"{sums.bits_per_byte:.4f}",
        )
    print_table(table)
    print(CONVENTION)


def _write_results(
    out: Path,
    head: dict[str, str],
    scored: Sequence[ScoredDocument],
    by_source: dict[str, Evaluation],
    total: Evaluation,
) -> None:
    """Write one JSON object to .json, or one line per document, source and total to .jsonl."""
    documents = [{"source": d.source, "document": d.origin, **to_fields(d.sums)} for d in scored]
    sources = [{"source": name, **to_fields(sums)} for name, sums in by_source.items()]
    if out.suffix == ".json":
        tree = {**head, "total": to_fields(total), "sources": sources, "documents": documents}
        text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
    else:
        rows = [{"of": "document", **row} for row in documents] + [{"of": "source", **row} for row in sources]
        rows.append({"of": "total", **head, **to_fields(total)})
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomically(out, text.encode())


def to_fields(sums: Evaluation) -> dict[str, float | int | None]:
    """Return the fields of an evaluation in JSON; a value that is not finite is null."""
    values: dict[str, float] = {
        "nll_nats": sums.nll,
        "loss": sums.loss,
        "perplexity": sums.perplexity,
        "bits_per_byte": sums.bits_per_byte,
        "n_tokens": sums.n_tokens,
        "n_bytes": sums.n_bytes,
        "n_documents": sums.n_documents,
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
