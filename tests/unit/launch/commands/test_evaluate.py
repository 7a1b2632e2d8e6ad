"""`turnout evaluate`: texts and corpora score as by hand, document by document, in any batches."""

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from tests.models import random_state, tiny_config, tiny_decoder
from tests.unit.by_hand import nll_by_hand
from tests.unit.data_fixtures import make_corpus, make_texts, write_jsonl
from tests.unit.saved_fixtures import SavedRun, make_saved_run, turnout
from turnout.data.corpus import Corpus
from turnout.data.sources import Source, iterate_documents
from turnout.data.windows import evaluation_documents, rolling_windows, text_documents
from turnout.training.checkpoint.directory import list_checkpoints
from turnout.training.errors import CheckpointError
from turnout.training.evaluation.held_out import Evaluation, score_documents
from turnout.training.evaluation.scoring import pack_windows, score_windows

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return make_saved_run(tmp_path_factory.mktemp("saved"))


def test_documents_equal_scoring_by_hand(saved: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, place = saved.corpus.load_tokenizer(), saved.place
    out = place / "scores.json"
    code = turnout("evaluate", saved.run_dir, f"A={place}/a.jsonl", place / "b.jsonl", "--out", out)
    said = capsys.readouterr().out
    assert code == 0
    scores = json.loads(out.read_text())
    assert {row["source"] for row in scores["documents"]} == {"A", "b"}
    assert [row["source"] for row in scores["documents"][:4]] == ["A", "b", "A", "b"]
    for source in (Source("A", place / "a.jsonl"), Source("b", place / "b.jsonl")):
        rows = [row for row in scores["documents"] if row["source"] == source.name]
        for row, document in zip(rows, iterate_documents(source), strict=True):
            ids = tokenizer.encode(document.text)
            want = nll_by_hand(saved.decoder, saved.state, ids, tokenizer.bos_id)
            n_bytes = len(document.text.encode())
            assert row["document"] == document.origin
            assert (row["n_tokens"], row["n_bytes"]) == (len(ids), n_bytes)
            assert row["nll_nats"] == pytest.approx(want, rel=1e-5)
            assert row["bits_per_byte"] == pytest.approx(want / math.log(2) / n_bytes, rel=1e-5)
            assert row["perplexity"] == pytest.approx(math.exp(want / len(ids)), rel=1e-4)
    total = scores["total"]
    for part in ("sources", "documents"):
        assert total["nll_nats"] == pytest.approx(sum(row["nll_nats"] for row in scores[part]), rel=1e-12)
        assert total["n_tokens"] == sum(row["n_tokens"] for row in scores[part])
    assert total["n_documents"] == 20
    assert total["bits_per_byte"] == pytest.approx(
        total["nll_nats"] / math.log(2) / total["n_bytes"], rel=1e-12
    )
    assert f"{total['bits_per_byte']:.4f}" in said and f"{total['loss']:.4f}" in said


def test_a_corpus_is_evaluated_as_in_its_run(saved: SavedRun, tmp_path: Path) -> None:
    out, corpus = tmp_path / "scores.jsonl", saved.corpus
    assert turnout("evaluate", saved.run_dir, "--corpus", corpus.path, "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    documents, bos_id = list(evaluation_documents(corpus)), corpus.load_tokenizer().bos_id
    assert [row["of"] for row in rows] == ["document"] * len(documents) + ["source"] * 2 + ["total"]
    for row, document in zip(rows, documents, strict=False):
        want = nll_by_hand(saved.decoder, saved.state, document.ids.tolist(), bos_id)
        assert row["nll_nats"] == pytest.approx(want, rel=1e-5)
    (checkpoint,) = list_checkpoints(saved.run_dir)
    train = [checkpoint, "--corpus", corpus.path, "--split", "train", "--max-documents", 3]
    assert turnout("evaluate", *train, "--out", out) == 0
    *scored, _ = (json.loads(line) for line in out.read_text().splitlines())
    assert [row["document"] for row in scored if row["of"] == "document"] == ["train:0", "train:0", "train:1"]


@pytest.mark.parametrize("router", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
def test_packed_windows_score_as_if_alone(router: dict[str, float], tmp_path: Path) -> None:
    cfg = tiny_config(vocab_size=300, seq_len=37, router=router)
    decoder, state = tiny_decoder(cfg, dtype=torch.float64, gain=3.0), random_state(cfg)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (90,), generator=generator).tolist()
    windows = [w for n in (1, 3, 20, 36, 37, 38, 11, 12, 13, 5, 90) for w in _windows(ids[:n])]
    sequences = pack_windows(windows, cfg)
    assert sorted(i for row in sequences for i in row) == list(range(len(windows)))
    assert all(sum(len(windows[i].inputs) for i in row) <= 37 for row in sequences)
    assert (len(sequences) < len(windows)) == (not router)
    together = score_windows(decoder, windows, state, microbatch_seqs=2)
    assert together.n_tokens.tolist() == [int((w.targets >= 0).sum()) for w in windows]
    for i, window in enumerate(windows):
        alone = score_windows(decoder, [window], state, microbatch_seqs=1)
        assert together.nll[i] == pytest.approx(float(alone.nll), rel=1e-9)
        assert together.is_greedy[i] == alone.is_greedy[0]


def _windows(ids: list[int]) -> list:
    return rolling_windows(ids, seq_len=37, bos_id=1)


def test_documents_come_in_order_however_many_are_scored_at_once(corpus: Corpus) -> None:
    cfg = tiny_config(vocab_size=300, seq_len=5)
    decoder, state = tiny_decoder(cfg, dtype=torch.float64), random_state(cfg)
    found = {}
    for microbatch_seqs in (1, 50):  # the first takes several rounds
        scored = score_documents(
            decoder, state, evaluation_documents(corpus), bos_id=1, microbatch_seqs=microbatch_seqs
        )
        found[microbatch_seqs] = {(d.source, d.origin): e.nll for d, e in scored}
        assert list(found[microbatch_seqs]) == [(d.source, d.origin) for d in evaluation_documents(corpus)]
    assert found[1] == pytest.approx(found[50], rel=1e-9)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "other", {"x": make_texts(30, seed=5)}, valid_frac=0.5)


def test_text_documents_are_taken_in_turn(saved: SavedRun) -> None:
    tokenizer = saved.corpus.load_tokenizer()
    sources = [Source(name, saved.place / f"{name}.jsonl") for name in ("a", "b")]
    found = list(text_documents(sources, tokenizer))
    assert "".join(d.source for d in found) == "ab" * 8 + "a" * 4
    assert all(tokenizer.decode(d.ids.tolist()).encode().__len__() == d.n_bytes for d in found)


def test_half_precision_is_close(saved: SavedRun, tmp_path: Path) -> None:
    bits = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        assert (
            turnout("evaluate", saved.run_dir, saved.place / "a.jsonl", "--dtype", dtype, "--out", out) == 0
        )
        bits[dtype] = json.loads(out.read_text())["total"]["bits_per_byte"]
    assert bits["float32"] != bits["bfloat16"] == pytest.approx(bits["float32"], rel=0.05)


BAD = [
    (["run"], 2, "name texts as PATH or NAME=PATH, or a --corpus"),
    (["run", "a.jsonl", "--corpus", "corpus"], 2, "but not both"),
    (["run", "a.jsonl", "--split", "train"], 2, "--split train has no effect without --corpus"),
    (["run", "--corpus", "corpus", "--text-field", "t"], 2, "--text-field t has no effect"),
    (["run", "a.jsonl", "--max-documents", "0"], 2, "--max-documents 0 must be at least 1"),
    (["run", "a.jsonl", "--out", "x.csv"], 2, "--out x.csv must end in .json or .jsonl"),
    (["run", "a.jsonl", "--out", "no/x.json"], 2, "a directory that exists"),
    (["run", "no.txt"], 3, "no.txt: no such file or directory"),
    (["run", "a.jsonl", "--text-field", "t"], 3, "no field 't' among ['text']"),
    (["run", "--corpus", "other"], 3, "has the tokenizer"),
    (["empty", "a.jsonl"], 2, "empty is not a run directory"),
    (["run/checkpoints/step-00000099", "a.jsonl"], 4, "no such checkpoint"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_answered_in_one_line(
    words: list[str], code: int, message: str, saved: SavedRun, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(saved.place)
    Path("empty").mkdir(exist_ok=True)
    if "other" in words and not Path("other").exists():
        write_jsonl(Path("other.jsonl"), make_texts(9))
        assert turnout("prepare", "other.jsonl", "--vocab-size", 295, "--workers", 1, "--out", "other") == 0
        capsys.readouterr()
    assert turnout("evaluate", *words) == code
    assert message in (said := capsys.readouterr().err.splitlines()[-1]), said


def test_a_broken_model_is_reported(saved: SavedRun) -> None:
    documents = text_documents([Source("a", saved.place / "a.jsonl")], saved.corpus.load_tokenizer())
    broken = deepcopy(saved.decoder)
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match=r"not finite in document .*a\.jsonl.* of a"):
        list(score_documents(broken, saved.state, documents, bos_id=1, microbatch_seqs=2))
    assert math.isnan(Evaluation(0.0, 0, 1, 1).perplexity) and Evaluation(9e9, 1, 1, 1).perplexity == math.inf


def test_a_damaged_checkpoint_is_refused(
    saved: SavedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved.run_dir, tmp_path / "run")
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    tensors = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    for path in (tmp_path / "run", checkpoint):
        assert turnout("evaluate", path, saved.place / "a.jsonl") == 4
        assert tensors.name in capsys.readouterr().err
