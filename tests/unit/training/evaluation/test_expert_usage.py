"""Recorded routing equals the slow twin, each token counts once, and the model is left as it was."""

import csv
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tests.models import random_state, tiny_config, tiny_decoder
from tests.unit.by_hand import experts_by_hand
from tests.unit.data_fixtures import write_hf_tokenizer
from tests.unit.saved_fixtures import SavedRun, make_saved_run, turnout
from turnout.data.loader import IGNORE_INDEX
from turnout.data.tokenizer import load_tokenizer
from turnout.data.windows import evaluation_documents
from turnout.launch.commands.experts import token_label
from turnout.launch.commands.figure import Figure
from turnout.moe.router import Router
from turnout.training.errors import ConfigError
from turnout.training.evaluation.expert_usage import (
    ExpertUsage,
    class_of_text,
    count_usage,
    input_windows,
    recording_routing,
    route_text,
    token_class,
)

VARIANTS = {
    "softmax": tiny_config(),
    "sigmoid, scaled, groups, dense first": tiny_config(
        n_layers=3, n_dense_layers=1, d_ff=24, top_k=3,
        router={"score": "sigmoid", "scale": 2.5, "n_groups": 3, "top_groups": 2},
    ),
    "not normalised": tiny_config(top_k=1, router={"normalize": False}),
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"  # the namespace of its elements
TEXT = "def the lever(): return 0417 of seven\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return make_saved_run(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_routing_of_a_text_equals_the_slow_twin(variant: str) -> None:
    cfg = VARIANTS[variant]
    decoder, state = tiny_decoder(cfg), random_state(cfg, bias=0.1)
    token_ids = torch.randint(31, (23,), generator=torch.Generator().manual_seed(4)).tolist()
    got = route_text(decoder, state, token_ids, microbatch_seqs=2)
    assert got.token_ids.tolist() == token_ids and got.is_kept_MTK.all()
    t = 0
    for window in input_windows(token_ids, cfg.seq_len):
        layers = experts_by_hand(decoder, cfg, state, window.inputs.tolist())
        for position in np.flatnonzero(window.targets != IGNORE_INDEX):
            for layer, rows in enumerate(layers):
                assert got.expert_ids_MTK[layer, t].tolist() == [e for e, _ in rows[position]]
                assert got.weights_MTK[layer, t].tolist() == pytest.approx([w for _, w in rows[position]])
            t += 1
    assert t == len(token_ids)


def test_hooks_are_gone_afterwards() -> None:
    decoder = tiny_decoder(tiny_config())
    with pytest.raises(RuntimeError, match="within"), recording_routing(decoder):
        raise RuntimeError("within")
    assert not any(module._forward_hooks for module in decoder.modules() if isinstance(module, Router))


def test_full_experts_are_marked() -> None:
    cfg = tiny_config(router={"capacity_factor": 0.75})
    routing = route_text(tiny_decoder(cfg), random_state(cfg), list(range(9)), microbatch_seqs=1)
    rows = torch.stack([ids.flatten().bincount(minlength=6) for ids in routing.expert_ids_MTK])
    n_kept = routing.is_kept_MTK.sum((1, 2))
    assert n_kept.tolist() == rows.clamp(max=math.ceil(0.75 * 9 * 2 / 6)).sum(-1).tolist()
    assert not routing.is_kept_MTK.all()


def test_every_token_counts_once(saved: SavedRun) -> None:
    decoder, state, tokenizer = saved.decoder, saved.state, saved.corpus.load_tokenizer()
    documents = list(evaluation_documents(saved.corpus))
    found = count_usage(
        decoder, state, documents, tokenizer, sources=["a", "b"], microbatch_seqs=3
    )  # fmt: skip
    want = np.zeros_like(found.counts_MGE)
    tokens: dict[tuple[str, str], int] = dict.fromkeys(found.groups, 0)
    for document in documents:
        token_ids = [tokenizer.bos_id, *document.ids.tolist(), tokenizer.eos_id]
        routing = route_text(decoder, state, token_ids, microbatch_seqs=1)
        for t, token in enumerate(token_ids):
            for group in (("class", token_class(token, tokenizer)), ("source", document.source)):
                tokens[group] += 1
                for layer in range(2):
                    want[layer, found.groups.index(group), routing.expert_ids_MTK[layer, t].numpy()] += 1
    np.testing.assert_array_equal(found.counts_MGE, want)
    assert dict(zip(found.groups, found.tokens_G.tolist(), strict=True)) == tokens
    n_tokens = sum(len(document.ids) + 2 for document in documents)
    for kind in ("class", "source"):
        mine = found.of_kind(kind)
        assert found.tokens_G[mine].sum() == n_tokens
        assert found.counts_MGE[:, mine].sum((1, 2)).tolist() == [n_tokens * 2] * 2
    assert tokens["class", "control"] == 2 * len(documents)
    assert len(found.of_kind("class")) >= 5


def test_counts_equal_those_the_model_reports(saved: SavedRun) -> None:
    """Compare with RouterStats.counts_E of the same tokens, one window per forward pass."""
    tokenizer, documents = saved.corpus.load_tokenizer(), list(evaluation_documents(saved.corpus))
    found = count_usage(
        saved.decoder, saved.state, documents, tokenizer, sources=["a", "b"], microbatch_seqs=8
    )
    want = torch.zeros(2, 6, dtype=torch.int64)
    for document in documents:
        ids = [tokenizer.bos_id, *document.ids.tolist(), tokenizer.eos_id]
        for window in input_windows(ids, 16):
            tokens = torch.zeros(1, 16, dtype=torch.int64)
            is_counted = torch.zeros(1, 16, dtype=torch.bool)
            tokens[0, : len(window.inputs)] = torch.from_numpy(window.inputs)
            is_counted[0, : len(window.inputs)] = torch.from_numpy(window.targets != IGNORE_INDEX)
            _, stats = saved.decoder(tokens, torch.zeros_like(tokens), is_counted, saved.state)
            want += stats.counts_E
    for kind in ("class", "source"):
        assert found.counts_MGE[:, found.of_kind(kind)].sum(1).tolist() == want.tolist()


CLASSES = {
    "x": "letters", " t": "letters", " ": "whitespace", "\n": "whitespace", "7": "digits", "(": "punctuation",
    "_": "punctuation",
}  # fmt: skip


def test_tokens_have_the_class_of_their_text(saved: SavedRun, tmp_path: Path) -> None:
    byte_level = load_tokenizer(write_hf_tokenizer(tmp_path / "t.json", special_tokens=["<s>", "</s>"]))
    for tokenizer in (saved.corpus.load_tokenizer(), byte_level):
        classes = {}
        for i in range(tokenizer.vocab_size):
            classes.setdefault(tokenizer.decode([i]), token_class(i, tokenizer))
        known = {text: name for text, name in CLASSES.items() if text in classes}
        assert len(known) >= 6
        assert {text: classes[text] for text in known} == known
        first, *_ = tokenizer.encode("\u4f60")
        assert token_class(first, tokenizer) == "other" and token_label(first, tokenizer) == f"<{first}>"
        assert (
            token_class(tokenizer.bos_id, tokenizer) == token_class(tokenizer.eos_id, tokenizer) == "control"
        )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "letters"),
        ("\u4f60\u597d", "letters"),
        ("\u0663", "digits"),
        ("\u20ac", "punctuation"),
        ("x1", "other"),
        ("\x00", "other"),
    ],
)
def test_text_of_any_script_has_a_class(text: str, name: str) -> None:
    assert class_of_text(text) == name


def test_what_an_expert_tells_is_measured_in_bits() -> None:
    groups = (("class", "letters"), ("class", "digits"), ("source", "a"))
    #  Layer 0: all letters go to expert 0 and all digits to expert 1; layer 1: both go anywhere.
    counts = np.array([[[6, 0, 0], [0, 6, 0], [6, 6, 0]], [[3, 3, 0], [3, 3, 0], [6, 6, 0]]])
    found = ExpertUsage(groups, np.array([6, 6, 12]), counts)
    assert found.information_bits("class") == pytest.approx([1, 0])
    assert found.information_bits("source") == pytest.approx([0, 0])
    shares, overall = found.shares("class")
    assert overall.tolist() == [0.5, 0.5]
    np.testing.assert_equal(shares[0], [[1, 0, np.nan], [0, 1, np.nan]])


def test_a_text_is_shown_and_drawn(saved: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = saved.corpus.load_tokenizer()
    token_ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    routing = route_text(saved.decoder, saved.state, token_ids, microbatch_seqs=8)
    for suffix in ("svg", "png"):
        out = saved.place / f"routes.{suffix}"
        assert turnout("experts", saved.run_dir, TEXT, "--out", out) == 0
        shown = capsys.readouterr().out
        rows = [line.split("\u2502")[1:-1] for line in shown.splitlines() if line.startswith("\u2502")]
        assert len(rows) == len(token_ids)
        for t, row in enumerate(rows):
            assert row[1].strip() == token_label(token_ids[t], tokenizer).strip()
            for layer, cell in enumerate(row[2:]):
                ids, weights = cell.split()[::2], cell.split()[1::2]
                assert list(map(int, ids)) == routing.expert_ids_MTK[layer, t].tolist()
                assert list(map(float, weights)) == pytest.approx(
                    routing.weights_MTK[layer, t].tolist(), abs=0.0051
                )
        assert "layer 1" in shown and "layer 2" in shown and "layer 0" not in shown
    tree = ElementTree.parse(saved.place / "routes.svg")
    tips = [tip.text or "" for tip in tree.iter(f"{SVG}title")]
    assert len(tips) == len(token_ids) * 2 * 2
    best = f"expert {int(routing.expert_ids_MTK[0, 3, 0])}, weight {float(routing.weights_MTK[0, 3, 0]):.4f}"
    assert any(best in tip and "layer 1" in tip for tip in tips)
    image = Image.open(saved.place / "routes.png")
    assert image.size == (int(tree.getroot().get("width", 0)), int(tree.getroot().get("height", 0)))
    boxes = [(box, box.find(f"{SVG}title")) for box in tree.iter(f"{SVG}rect")]
    drawn = [box for box, tip in boxes if tip is not None]
    assert len({box.get("fill") for box in drawn}) > 3
    for box in drawn:
        corner = math.ceil(float(box.get("x", 0))) + 1, math.ceil(float(box.get("y", 0))) + 1
        assert image.getpixel(corner) == ImageColor.getrgb(box.get("fill", ""))


def test_a_png_has_a_size_limit(tmp_path: Path) -> None:
    figure = Figure(20_000, 9_000)
    with pytest.raises(
        ConfigError, match=r"20000 x 9000 pixels are more than the 178,956,970 that a PNG may have"
    ):
        figure.save(tmp_path / "a.png")
    figure.save(tmp_path / "a.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_a_corpus_is_counted_and_drawn(saved: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    out = saved.place / "deep" / "figures"
    assert (
        turnout("experts", saved.run_dir, "--corpus", saved.corpus.path, "--split", "train", "--out", out)
        == 0
    )
    assert "bits" in capsys.readouterr().out
    tree = json.loads((out / "routes.json").read_text())
    n_tokens = saved.corpus.manifest.total("train").n_tokens
    assert tree["n_documents"] == saved.corpus.manifest.total("train").n_documents
    for kind in ("class", "source"):
        assert sum(tree["tokens"][kind].values()) == n_tokens
        for layer in tree["layers"]:
            assert sum(map(sum, layer["rows"][kind].values())) == 2 * n_tokens
    with (out / "routes.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {row["layer"] for row in rows} == {"1", "2"}
    for row in rows:
        counts = tree["layers"][int(row["layer"]) - 1]["rows"][row["kind"]]
        expert = int(row["expert"])
        of_expert = sum(group[expert] for group in counts.values())
        overall = tree["tokens"][row["kind"]][row["group"]] / n_tokens
        assert int(row["rows"]) == counts[row["group"]][expert]
        assert float(row["share_of_expert"]) == pytest.approx(int(row["rows"]) / of_expert, rel=1e-5)
        assert float(row["share_of_tokens"]) == pytest.approx(overall, rel=1e-5)
        assert float(row["ratio"]) == pytest.approx(int(row["rows"]) / of_expert / overall, rel=1e-4)
    ElementTree.parse(out / "routes.svg")


BAD = [
    ([], "give a text, in quotes, or a --corpus, but not both"),
    (["words", "--corpus", "corpus"], "but not both"),
    ([""], "the text is empty"),
    (["words", "--split", "train"], "--split train has no effect without --corpus"),
    (["words", "--out", "x.pdf"], "must end in .svg or .png"),
    (["--corpus", "corpus"], "must be a directory"),
    (["--corpus", "corpus", "--out", "a.jsonl"], "must be a directory"),
    (["--corpus", "corpus", "--out", "a.jsonl/x"], "--out a.jsonl/x cannot be created: Not a directory"),
    (["the \udcff"], "the text: character 4 is not UTF-8"),
    (["--corpus", "corpus", "--out", "new", "--max-documents", "0"], "--max-documents 0 must be at least 1"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[ascii(" ".join(case[0])) for case in BAD])
def test_bad_input_is_answered_in_one_line(
    words: list[str], message: str, saved: SavedRun, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(saved.place)
    assert turnout("experts", "run", *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
