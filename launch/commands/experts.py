"""`turnout experts`: which experts each token of a text takes, and what the experts of a corpus are for."""

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
from turnout.launch.commands.figure import PICTURES, Figure, expert_colour, ratio_colour
from turnout.launch.console import LiveBar, print_table
from turnout.launch.models import DType, LoadedModel, load_model
from turnout.training.errors import ConfigError, printable
from turnout.training.evaluation.expert_usage import Specialisation, TokenRoutes, count_routes, route_text
from turnout.training.generation.text_stream import REPLACEMENT

KINDS = ("class", "source")
COLUMNS = ("layer", "expert", "kind", "group", "rows", "share_of_expert", "share_of_tokens", "ratio")
# Of the figures, in pixels.
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
    """Show the routes of a text, or count a corpus's. Raises ConfigError, DataError or CheckpointError."""
    if (text is None) == (corpus is None):
        raise ConfigError("give a text, in quotes, or a --corpus, but not both")
    if text == "":
        raise ConfigError("the text is empty; give some words, in quotes")
    if text is not None:
        check_text(text, "the text")
    for option, value in (("--split", split), ("--max-documents", max_documents)):
        if value is not None and corpus is None:
            raise ConfigError(f"{option} {value} has no effect without --corpus; drop it")
    check_at_least(1, {"--max-documents": max_documents, "--microbatch-seqs": microbatch_seqs})
    if text is not None:
        check_out_file(out, PICTURES)
        _show_text(load_model(path, dtype=dtype), text, microbatch_seqs, out)
        return
    assert corpus is not None
    if out is None or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out}: with --corpus it names a directory for the figure and the tables")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"--out {out} cannot be made: {err.strerror or err}; name another place") from err
    opened = open_corpus(corpus, verify="size")  # before the model is read, which can take minutes
    model = load_model(path, dtype=dtype, corpus=opened)
    _count_corpus(model, opened, split or "valid", max_documents, microbatch_seqs, out)


def _show_text(model: LoadedModel, text: str, microbatch_seqs: int, out: Path | None) -> None:
    tokenizer = model.tokenizer
    token_ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    cfg = model.decoder.cfg
    figure = _text_canvas(cfg.n_moe_layers, len(token_ids), cfg.top_k)
    if out is not None:
        figure.check_size(out)
    routes = route_text(model.decoder, model.state, token_ids, microbatch_seqs=microbatch_seqs)
    labels = [token_label(i, tokenizer) for i in token_ids]
    first_layer = cfg.n_layers - cfg.n_moe_layers
    for table in _text_tables(routes, labels, first_layer, Console()):
        print_table(table)
    if out is not None:
        _draw_text(figure, routes, labels, first_layer)
        figure.save(out)
        print(f"figure: {out}")


def token_label(token_id: int, tokenizer: Tokenizer) -> str:
    """Return a token's text in quotes, or its id where it has no text of its own."""
    names = {tokenizer.eos_id: "<eos>", tokenizer.bos_id: "<bos>"}
    text = tokenizer.decode([token_id])
    return names.get(token_id) or (f"<{token_id}>" if not text or REPLACEMENT in text else repr(text))


def _text_tables(routes: TokenRoutes, labels: list[str], first_layer: int, console: Console) -> list[Table]:
    """Return one table, or on a terminal as many, side after side, as have room for all layers."""
    n_layers, _, top_k = routes.expert_ids_MTK.shape
    n_digits = len(str(int(routes.expert_ids_MTK.max())))
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
            cells = [_cell(routes, layer, t, n_digits) for layer in layers]
            table.add_row(str(t), Text(label), *cells)
        tables.append(table)
    return tables


def _cell(routes: TokenRoutes, layer: int, t: int, n_digits: int) -> Text:
    cell = Text()
    for expert, weight, is_kept in _choices(routes, layer, t):
        words = f"{expert:>{n_digits}} {f'{weight:.2f}' if is_kept else 'full'}"
        cell.append(words, style=f"black on {expert_colour(expert)}").append(" ")
    cell.rstrip()
    return cell


def _choices(routes: TokenRoutes, layer: int, t: int) -> list[tuple[int, float, bool]]:
    parts = (routes.expert_ids_MTK, routes.weights_MTK, routes.is_kept_MTK)
    return list(zip(*(part[layer, t].tolist() for part in parts), strict=True))


def _text_canvas(n_layers: int, n_tokens: int, top_k: int) -> Figure:
    width = 2 * MARGIN + LABEL + n_layers * (CHOICE * top_k + 6)
    return Figure(width, 2 * MARGIN + (n_tokens + 1) * ROW)


def _draw_text(figure: Figure, routes: TokenRoutes, labels: list[str], first_layer: int) -> None:
    """Draw one row per token, one column per layer; each cell is cut by the weights of its experts."""
    n_layers, n_tokens, top_k = routes.expert_ids_MTK.shape
    width = CHOICE * top_k
    for layer in range(n_layers):
        x = MARGIN + LABEL + layer * (width + 6)
        figure.add_words(x + width / 2, MARGIN + ROW / 2, f"layer {first_layer + layer}", is_centred=True)
        for t in range(n_tokens):
            y, left = MARGIN + (t + 1) * ROW, float(x)
            choices = _choices(routes, layer, t)
            total = math.fsum(weight for _, weight, _ in choices) or 1.0
            for expert, weight, is_kept in choices:
                part = width * weight / total
                tip = f"{labels[t]}, layer {first_layer + layer}: expert {expert}, weight {weight:.4f}"
                fill = expert_colour(expert) if is_kept else "#dddddd"
                figure.add_box(left, y, part, ROW - 2, fill, tip if is_kept else f"{tip}, full")
                if part >= 8 * len(str(expert)):
                    figure.add_words(left + part / 2, y + ROW / 2 - 1, str(expert), size=11, is_centred=True)
                left += part
    for t, label in enumerate(labels):
        figure.add_words(MARGIN, MARGIN + (t + 1.5) * ROW, label[:18])


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
        found = count_routes(
            model.decoder,
            model.state,
            _told(islice(evaluation_documents(corpus, split), max_documents), bar),
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
    write_atomically(out / "routes.tsv", _tsv(found, first_layer).encode())
    write_atomically(out / "routes.json", (json.dumps(head | _tree(found, first_layer)) + "\n").encode())
    _corpus_figure(found, first_layer).save(out / "routes.svg")
    _print_summary(found, first_layer)
    print(f"figure and tables: {out / 'routes.svg'}, {out / 'routes.tsv'}, {out / 'routes.json'}")


def _told(documents: Iterable[EvaluationDocument], bar: LiveBar) -> Iterator[EvaluationDocument]:
    for n_done, document in enumerate(documents):
        bar.update(n_done, f"routing: {n_done:,} documents")
        yield document


def _tsv(found: Specialisation, first_layer: int) -> str:
    lines = ["\t".join(COLUMNS)]
    for kind in KINDS:
        shares_MGE, shares_G = found.shares(kind)
        for (layer, place, expert), share in np.ndenumerate(shares_MGE):
            g = found.of_kind(kind)[place]
            words = (first_layer + layer, expert, kind, printable(found.groups[g][1]))
            rows, overall = found.counts_MGE[layer, g, expert], shares_G[place]
            numbers = (rows, f"{share:.6g}", f"{overall:.6g}", f"{share / overall:.6g}")
            lines.append("\t".join(map(str, (*words, *numbers))))
    return "\n".join(lines) + "\n"


def _tree(found: Specialisation, first_layer: int) -> dict[str, object]:
    def named(kind: str, values: np.ndarray) -> dict[str, object]:
        return {found.groups[g][1]: values[g].tolist() for g in found.of_kind(kind)}

    bits = {kind: found.information_bits(kind).tolist() for kind in KINDS}
    return {
        "tokens": {kind: named(kind, found.tokens_G) for kind in KINDS},
        "layers": [
            {
                "layer": first_layer + layer,
                "information_bits": {kind: bits[kind][layer] for kind in KINDS},
                "rows": {kind: named(kind, counts_GE) for kind in KINDS},
            }
            for layer, counts_GE in enumerate(found.counts_MGE)
        ],
    }


def _told_apart(found: Specialisation) -> list[str]:
    """Return the kinds with several groups: of a single source there is nothing to tell."""
    return [kind for kind in KINDS if len(found.of_kind(kind)) > 1]


def _print_summary(found: Specialisation, first_layer: int) -> None:
    """Print of each layer how much its experts tell, and its sharpest specialist of each kind."""
    kinds = _told_apart(found)
    table = Table("layer", *(f"{kind}: {what}" for kind in kinds for what in ("bits", "sharpest expert")))
    columns = []
    for kind in kinds:
        bits_M, (shares_MGE, shares_G) = found.information_bits(kind), found.shares(kind)
        names = [printable(found.groups[g][1]) for g in found.of_kind(kind)]
        column = []
        for bits, shares_GE in zip(bits_M, shares_MGE, strict=True):
            # Of the rows that an expert has too many of: most, not the largest ratio, which rare groups have.
            excess_GE = np.nan_to_num(shares_GE - shares_G[:, None])
            g, expert = np.unravel_index(excess_GE.argmax(), excess_GE.shape)
            share = f"{shares_GE[g, expert]:.0%} {names[g]} (of all {shares_G[g]:.0%})"
            column.append((f"{bits:.3f}", f"{expert}: {share}"))
        columns.append(column)
    for layer, cells in enumerate(zip(*columns, strict=True)):
        table.add_row(str(first_layer + layer), *(Text(word) for cell in cells for word in cell))
    print_table(table)


def _corpus_figure(found: Specialisation, first_layer: int) -> Figure:
    """One panel per layer: groups against experts, coloured by the share in the expert over that of all."""
    n_layers, _, n_experts = found.counts_MGE.shape
    kinds = _told_apart(found)
    n_groups = sum(len(found.of_kind(kind)) for kind in kinds)
    width = max(8.0, min(40.0, 1200 / n_experts))
    panel = (n_groups + 3) * ROW
    figure = Figure(2 * MARGIN + LABEL + max(480, n_experts * width), 2 * MARGIN + ROW + n_layers * panel)
    legend = "share of an expert's rows / share of all tokens: "
    figure.add_words(MARGIN, MARGIN + ROW / 2, legend + "red more (x8), white equal, blue less (x1/8)")
    for layer in range(n_layers):
        top = MARGIN + ROW + layer * panel + ROW / 2
        told = ", ".join(f"{found.information_bits(kind)[layer]:.3f} bits of {kind}" for kind in kinds)
        figure.add_words(MARGIN, top + ROW / 2, f"layer {first_layer + layer}: experts tell {told}")
        y = top + ROW
        for kind in kinds:
            shares_MGE, shares_G = found.shares(kind)
            for place, g in enumerate(found.of_kind(kind)):
                label = printable(found.groups[g][1])
                figure.add_words(MARGIN, y + ROW / 2, label[:18])
                for expert, share in enumerate(shares_MGE[layer, place]):
                    ratio = share / shares_G[place]
                    colour = "#dddddd" if math.isnan(ratio) else ratio_colour(math.log2(max(ratio, 2**-9)))
                    tip = f"expert {expert}, {label}: {share:.1%} against {shares_G[place]:.1%}"
                    x = MARGIN + LABEL + expert * width
                    figure.add_box(x, y, width - 1, ROW - 1, colour, tip)
                    if width >= 30 and not math.isnan(ratio):
                        figure.add_words(x + width / 2, y + ROW / 2, f"{ratio:.1f}", size=10, is_centred=True)
                y += ROW
        for expert in range(n_experts):
            if width >= 16 or expert % 8 == 0:
                x = MARGIN + LABEL + (expert + 0.5) * width
                figure.add_words(x, y + ROW / 2, str(expert), size=10, is_centred=True)
    return figure
