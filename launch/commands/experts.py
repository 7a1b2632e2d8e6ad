"""`turnout experts`: which experts each token of a text uses, and what the experts specialise in."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnout.data.corpus import Corpus, open_corpus
from turnout.data.files import write_atomically
from turnout.data.tokenizer import Tokenizer
from turnout.data.windows import EvaluationDocument, evaluation_documents
from turnout.launch.arguments import check_at_least, check_out_file, check_text
from turnout.launch.commands.evaluate import n_documents_of
from turnout.launch.commands.figure import FIGURE_SUFFIXES, Figure, expert_colour, ratio_colour
from turnout.launch.console import LiveBar, print_table
from turnout.launch.models import DType, LoadedModel, load_model
from turnout.training.errors import ConfigError, printable
from turnout.training.evaluation.expert_usage import ExpertUsage, TokenRouting, count_usage, route_text
from turnout.training.generation.text_stream import REPLACEMENT

KINDS = ("class", "source")
COLUMNS = ("layer", "expert", "kind", "group", "rows", "share_of_expert", "share_of_tokens", "ratio")
# Pixels in the figures: height of a row; widths of a margin, of the labels and of one expert of a token.
ROW, MARGIN, LABEL, CHOICE = 20, 12, 120, 34


def run_experts(
    path: Path,
    text: str | None,
    *,
    corpus: Path | None,
    split: str | None,
    max_documents: int | None,
    microbatch_seqs: int,
    dtype: DType,
    out: Path | None,
) -> None:
    """Show the routing of a text, or count expert usage over a corpus.

    Raises ConfigError, DataError or CheckpointError.
    """
    if (text is None) == (corpus is None):
        raise ConfigError("give a text, in quotes, or a --corpus, but not both")
    if text == "":
        raise ConfigError("the text is empty; give some text, in quotes")
    if text is not None:
        check_text(text, "the text")
    for option, value in (("--split", split), ("--max-documents", max_documents)):
        if value is not None and corpus is None:
            raise ConfigError(f"{option} {value} has no effect without --corpus; drop it")
    check_at_least(1, {"--max-documents": max_documents, "--microbatch-seqs": microbatch_seqs})
    if text is not None:
        check_out_file(out, FIGURE_SUFFIXES)
        _show_text(load_model(path, dtype=dtype), text, microbatch_seqs, out)
        return
    assert corpus is not None
    if out is None or (out.exists() and not out.is_dir()):
        raise ConfigError(
            f"--out {out} must be a directory, for the figure and the tables of --corpus; name one"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(
            f"--out {out} cannot be created: {err.strerror or err}; name another directory"
        ) from err
    opened = open_corpus(corpus, verify="size")  # fail before the model is read, which can take minutes
    model = load_model(path, dtype=dtype, corpus=opened)
    _count_corpus(model, opened, split or "valid", max_documents, microbatch_seqs, out)


def _show_text(model: LoadedModel, text: str, microbatch_seqs: int, out: Path | None) -> None:
    tokenizer = model.tokenizer
    token_ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    cfg = model.decoder.cfg
    figure = _text_canvas(cfg.n_moe_layers, len(token_ids), cfg.top_k)
    if out is not None:
        figure.check_size(out)
    routing = route_text(model.decoder, model.state, token_ids, microbatch_seqs=microbatch_seqs)
    labels = [token_label(i, tokenizer) for i in token_ids]
    first_layer = cfg.n_layers - cfg.n_moe_layers
    for table in _text_tables(routing, labels, first_layer, Console()):
        print_table(table)
    if out is not None:
        _draw_text(figure, routing, labels, first_layer)
        figure.save(out)
        print(f"figure: {out}")


def token_label(token_id: int, tokenizer: Tokenizer) -> str:
    """Return a token's text in quotes, or its id if it is no whole character."""
    names = {tokenizer.eos_id: "<eos>", tokenizer.bos_id: "<bos>"}
    text = tokenizer.decode([token_id])
    return names.get(token_id) or (f"<{token_id}>" if not text or REPLACEMENT in text else repr(text))


def _text_tables(routing: TokenRouting, labels: list[str], first_layer: int, console: Console) -> list[Table]:
    """Return one table; on a terminal as many as it takes to fit the layers into its width."""
    n_layers, _, top_k = routing.expert_ids_MTK.shape
    n_digits = len(str(int(routing.expert_ids_MTK.max())))
    per_table = n_layers
    if console.is_terminal:
        room = console.width - max(map(len, labels)) - len(str(len(labels))) - 8
        per_table = max(1, room // (top_k * (n_digits + 6) + 2))
    tables = []
    for first in range(0, n_layers, per_table):
        table = Table("", "token")
        layers = range(first, min(first + per_table, n_layers))
        for layer in layers:
            table.add_column(f"layer {first_layer + layer}", no_wrap=True)
        for t, label in enumerate(labels):
            cells = [_cell(routing, layer, t, n_digits) for layer in layers]
            table.add_row(str(t), Text(label), *cells)
        tables.append(table)
    return tables


def _cell(routing: TokenRouting, layer: int, t: int, n_digits: int) -> Text:
    cell = Text()
    for expert, weight, is_kept in _choices(routing, layer, t):
        text = f"{expert:>{n_digits}} {f'{weight:.2f}' if is_kept else 'full'}"
        cell.append(text, style=f"black on {expert_colour(expert)}").append(" ")
    cell.rstrip()
    return cell


def _choices(routing: TokenRouting, layer: int, t: int) -> list[tuple[int, float, bool]]:
    parts = (routing.expert_ids_MTK, routing.weights_MTK, routing.is_kept_MTK)
    return list(zip(*(part[layer, t].tolist() for part in parts), strict=True))


def _text_canvas(n_layers: int, n_tokens: int, top_k: int) -> Figure:
    width = 2 * MARGIN + LABEL + n_layers * (CHOICE * top_k + 6)
    return Figure(width, 2 * MARGIN + (n_tokens + 1) * ROW)


def _draw_text(figure: Figure, routing: TokenRouting, labels: list[str], first_layer: int) -> None:
    """Draw one row per token and one column per layer; a cell is divided by its experts' weights."""
    n_layers, n_tokens, top_k = routing.expert_ids_MTK.shape
    width = CHOICE * top_k
    for layer in range(n_layers):
        x = MARGIN + LABEL + layer * (width + 6)
        figure.add_label(x + width / 2, MARGIN + ROW / 2, f"layer {first_layer + layer}", is_centred=True)
        for t in range(n_tokens):
            y, left = MARGIN + (t + 1) * ROW, float(x)
            choices = _choices(routing, layer, t)
            total = math.fsum(weight for _, weight, _ in choices) or 1.0
            for expert, weight, is_kept in choices:
                part = width * weight / total
                tip = f"{labels[t]}, layer {first_layer + layer}: expert {expert}, weight {weight:.4f}"
                fill = expert_colour(expert) if is_kept else "#dddddd"
                figure.add_box(left, y, part, ROW - 2, fill, tip if is_kept else f"{tip}, full")
                if part >= 8 * len(str(expert)):
                    figure.add_label(left + part / 2, y + ROW / 2 - 1, str(expert), size=11, is_centred=True)
                left += part
    for t, label in enumerate(labels):
        figure.add_label(MARGIN, MARGIN + (t + 1.5) * ROW, label[:18])


def _count_corpus(
    model: LoadedModel,
    corpus: Corpus,
    split: str,
    max_documents: int | None,
    microbatch_seqs: int,
    out: Path,
) -> None:
    n_documents = n_documents_of(corpus, split, max_documents)
    with LiveBar("routing", n_documents) as bar:
        usage = count_usage(
            model.decoder,
            model.state,
            _with_progress(islice(evaluation_documents(corpus, split), max_documents), bar),
            model.tokenizer,
            sources=[stream.name for stream in corpus.split(split)],
            microbatch_seqs=microbatch_seqs,
        )
    first_layer = model.decoder.cfg.n_layers - model.decoder.cfg.n_moe_layers
    head = {
        "model": str(model.place),
        "corpus": str(corpus.path),
        "split": split,
        "n_documents": n_documents,
        "top_k": model.decoder.cfg.top_k,
    }
    write_atomically(out / "routes.tsv", _tsv(usage, first_layer).encode())
    write_atomically(out / "routes.json", (json.dumps(head | _tree(usage, first_layer)) + "\n").encode())
    _corpus_figure(usage, first_layer).save(out / "routes.svg")
    _print_summary(usage, first_layer)
    print(f"figure and tables: {out / 'routes.svg'}, {out / 'routes.tsv'}, {out / 'routes.json'}")


def _with_progress(documents: Iterable[EvaluationDocument], bar: LiveBar) -> Iterator[EvaluationDocument]:
    for n_done, document in enumerate(documents):
        bar.update(n_done, f"routing: {n_done:,} documents")
        yield document


def _tsv(usage: ExpertUsage, first_layer: int) -> str:
    lines = ["\t".join(COLUMNS)]
    for kind in KINDS:
        shares_MGE, shares_G = usage.shares(kind)
        for (layer, idx, expert), share in np.ndenumerate(shares_MGE):
            g = usage.of_kind(kind)[idx]
            key = (first_layer + layer, expert, kind, printable(usage.groups[g][1]))
            rows, overall = usage.counts_MGE[layer, g, expert], shares_G[idx]
            numbers = (rows, f"{share:.6g}", f"{overall:.6g}", f"{share / overall:.6g}")
            lines.append("\t".join(map(str, (*key, *numbers))))
    return "\n".join(lines) + "\n"


def _tree(usage: ExpertUsage, first_layer: int) -> dict[str, object]:
    def named(kind: str, values: np.ndarray) -> dict[str, object]:
        return {usage.groups[g][1]: values[g].tolist() for g in usage.of_kind(kind)}

    bits = {kind: usage.information_bits(kind).tolist() for kind in KINDS}
    return {
        "tokens": {kind: named(kind, usage.tokens_G) for kind in KINDS},
        "layers": [
            {
                "layer": first_layer + layer,
                "information_bits": {kind: bits[kind][layer] for kind in KINDS},
                "rows": {kind: named(kind, counts_GE) for kind in KINDS},
            }
            for layer, counts_GE in enumerate(usage.counts_MGE)
        ],
    }


def _compared_kinds(usage: ExpertUsage) -> list[str]:
    """Return the kinds that have several groups: with a single source there is nothing to compare."""
    return [kind for kind in KINDS if len(usage.of_kind(kind)) > 1]


def _print_summary(usage: ExpertUsage, first_layer: int) -> None:
    """Print for each layer the information in its choice of experts, and its sharpest specialists."""
    kinds = _compared_kinds(usage)
    table = Table("layer", *(f"{kind}: {what}" for kind in kinds for what in ("bits", "sharpest expert")))
    columns = []
    for kind in kinds:
        bits_M, (shares_MGE, shares_G) = usage.information_bits(kind), usage.shares(kind)
        names = [printable(usage.groups[g][1]) for g in usage.of_kind(kind)]
        column = []
        for bits, shares_GE in zip(bits_M, shares_MGE, strict=True):
            # The largest excess of rows over the average; the largest ratio would favour rare groups.
            excess_GE = np.nan_to_num(shares_GE - shares_G[:, None])
            g, expert = np.unravel_index(excess_GE.argmax(), excess_GE.shape)
            share = f"{shares_GE[g, expert]:.0%} {names[g]} (of all {shares_G[g]:.0%})"
            column.append((f"{bits:.3f}", f"{expert}: {share}"))
        columns.append(column)
    for layer, cells in enumerate(zip(*columns, strict=True)):
        table.add_row(str(first_layer + layer), *(Text(text) for cell in cells for text in cell))
    print_table(table)


def _corpus_figure(usage: ExpertUsage, first_layer: int) -> Figure:
    """Draw one panel per layer, groups by experts, coloured by share of the expert over share of all."""
    n_layers, _, n_experts = usage.counts_MGE.shape
    kinds = _compared_kinds(usage)
    n_groups = sum(len(usage.of_kind(kind)) for kind in kinds)
    width = max(8.0, min(40.0, 1200 / n_experts))
    panel = (n_groups + 3) * ROW
    figure = Figure(2 * MARGIN + LABEL + max(480, n_experts * width), 2 * MARGIN + ROW + n_layers * panel)
    legend = "share of an expert's rows / share of all tokens: "
    figure.add_label(MARGIN, MARGIN + ROW / 2, legend + "red more (x8), white equal, blue less (x1/8)")
    for layer in range(n_layers):
        top = MARGIN + ROW + layer * panel + ROW / 2
        bits = ", ".join(f"{usage.information_bits(kind)[layer]:.3f} bits of {kind}" for kind in kinds)
        figure.add_label(MARGIN, top + ROW / 2, f"layer {first_layer + layer}: the expert tells {bits}")
        y = top + ROW
        for kind in kinds:
            shares_MGE, shares_G = usage.shares(kind)
            for idx, g in enumerate(usage.of_kind(kind)):
                label = printable(usage.groups[g][1])
                figure.add_label(MARGIN, y + ROW / 2, label[:18])
                for expert, share in enumerate(shares_MGE[layer, idx]):
                    ratio = share / shares_G[idx]
                    colour = "#dddddd" if math.isnan(ratio) else ratio_colour(math.log2(max(ratio, 2**-9)))
                    tip = f"expert {expert}, {label}: {share:.1%} against {shares_G[idx]:.1%}"
                    x = MARGIN + LABEL + expert * width
                    figure.add_box(x, y, width - 1, ROW - 1, colour, tip)
                    if width >= 30 and not math.isnan(ratio):
                        figure.add_label(x + width / 2, y + ROW / 2, f"{ratio:.1f}", size=10, is_centred=True)
                y += ROW
        for expert in range(n_experts):
            if width >= 16 or expert % 8 == 0:
                x = MARGIN + LABEL + (expert + 0.5) * width
                figure.add_label(x, y + ROW / 2, str(expert), size=10, is_centred=True)
    return figure
