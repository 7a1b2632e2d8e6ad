"""The gate catches a broken export, whatever broke it, and leaves nothing behind."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from tests.exports import DecoderWeights, run_config_of, save_weights, variant_weights
from tests.models import tiny_config, tiny_decoder
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import open_corpus
from turnout.launch.cli.main import main
from turnout.launch.commands.export import corpus_of, publish
from turnout.launch.settings import to_toml
from turnout.moe.router import Router
from turnout.training.checkpoint.manifest import Attached, DataIdentity
from turnout.training.checkpoint.weights import CheckpointWeights
from turnout.training.errors import ConfigError, ExportError
from turnout.training.export import gguf_file, huggingface
from turnout.training.export.gate import (
    MIN_COMPARED,
    Expected,
    _is_close,
    check_logits,
    choose_rows,
    expected_logits,
    held_out_tokens,
    random_tokens,
    row_lengths,
    shortage,
)
from turnout.training.export.gguf_file import read_back_gguf
from turnout.training.export.huggingface import Slot, slots
from turnout.training.export.reader import read_back_huggingface
from turnout.training.export.to_checkpoint import write_first_checkpoint


def with_slots(change: Callable[[Slot], Slot | None]) -> dict[tuple[Any, str], Any]:
    def broken(architecture: Any, cfg: Any) -> Iterator[Slot]:
        return (new for slot in slots(architecture, cfg) if (new := change(slot)) is not None)

    return {(huggingface, "slots"): broken}


def swap_experts(slot: Slot) -> Slot:
    if slot.ours == "blocks.1.moe.experts.gate_up" and slot.index in (2, 3):
        return replace(slot, index=5 - slot.index)
    return slot


def shift_bias(slot: Slot) -> Slot:
    return replace(slot, index=1) if slot.kind == "bias" and slot.index == 0 else slot


def swap_norms(slot: Slot) -> Slot:
    swapped = {"blocks.0.attn_norm.weight": "blocks.0.ffn_norm.weight"}
    return replace(slot, ours=swapped.get(slot.ours, slot.ours))


def flip_q(weights: Any, slot: Slot) -> Tensor:
    values = READ_SLOT(weights, slot)
    return values.flip(0) if slot.ours == "blocks.2.attn.q.weight" else values


def nudge(name: str, index: int | None) -> Callable[[Any, Slot], Tensor]:
    """Return a reader that is off by one bit, which no logit shows."""

    def nudged(weights: Any, slot: Slot) -> Tensor:
        values = READ_SLOT(weights, slot).clone()
        if slot.ours == name and slot.index == index:
            values[1, 2] = values[1, 2].nextafter(torch.tensor(torch.inf))
        return values

    return nudged


def change_length(*arguments: Any, **keywords: Any) -> dict[str, Any]:
    return {**TO_CONFIG(*arguments, **keywords), "max_position_embeddings": 42}


def change_theta(*arguments: Any, **keywords: Any) -> dict[str, Any]:
    tree = TO_CONFIG(*arguments, **keywords)
    tree["rope_parameters"]["rope_theta"] *= 1.01
    return tree


def change_eos(*arguments: Any, **keywords: Any) -> None:
    WRITE_TOKENIZER(*arguments, **keywords)
    path = arguments[1] / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "</s>"', '"eos_token": "<s>"'))


def join_control_tokens(*arguments: Any, **keywords: Any) -> None:
    WRITE_TOKENIZER(*arguments, **keywords)
    path = arguments[1] / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"split_special_tokens": true', '"split_special_tokens": false'))


READ_SLOT, TO_CONFIG, WRITE_TOKENIZER = (
    huggingface.read_slot,
    huggingface.to_hf_config,
    huggingface.write_tokenizer,
)
NAME_OF_HEAD = "lm_head.weight"
LOGITS = "largest logit difference"
SABOTAGE: dict[str, tuple[str, dict[tuple[Any, str], Any], str]] = {
    "experts swapped": ("mixtral-gqa", with_slots(swap_experts), LOGITS),
    "rows of q permuted": ("qwen3-gqa", {(huggingface, "read_slot"): flip_q}, LOGITS),
    "rope_theta changed": ("mixtral-gqa", {(huggingface, "to_hf_config"): change_theta}, LOGITS),
    "bias of another layer": ("glm4-all", with_slots(shift_bias), LOGITS),
    "norms swapped": ("glm4-plain", with_slots(swap_norms), LOGITS),
    "tensor missing": ("mixtral-gqa", with_slots(lambda s: None if s.name == NAME_OF_HEAD else s), "missing"),
    "tensor unknown": (
        "qwen3-gqa",
        with_slots(lambda s: replace(s, name="other") if s.name.endswith("0.mlp.gate.weight") else s),
        "missing|unexpected",
    ),
    "a bit of an expert": (
        "mixtral-mha-tied",
        {(huggingface, "read_slot"): nudge("blocks.1.moe.experts.down", 4)},
        "blocks.1.moe.experts.down of expert 4 was written with other values",
    ),
    "a bit of a matrix": (
        "glm4-plain",
        {(huggingface, "read_slot"): nudge("blocks.2.attn.o.weight", None)},
        "blocks.2.attn.o.weight was written with other values",
    ),
    "other length": (
        "qwen3-gqa",
        {(huggingface, "to_hf_config"): change_length},
        "config.json reads as model.seq_len=42 where the model has 41",
    ),
    "other end of text": (
        "mixtral-gqa",
        {(huggingface, "write_tokenizer"): change_eos},
        "begins and ends a text with ids (1, 1)",
    ),
    "text becomes control": (
        "mixtral-gqa",
        {(huggingface, "write_tokenizer"): join_control_tokens},
        "tokenises 'a<s>b</s> c' differently",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_caught_and_leaves_nothing(
    name: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variant, patches, words = SABOTAGE[name]
    checkpoint = save_weights(variant_weights(variant, tokenizer), tmp_path / "run")
    command = ["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--format", "hf"]
    with monkeypatch.context() as patched:
        for (module, attribute), value in patches.items():
            patched.setattr(module, attribute, value)
        with pytest.raises(SystemExit) as end:
            main(command)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert any(word in said[-1] for word in words.split("|")), said[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_gguf_of_other_settings_is_caught(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_weights(variant_weights("mixtral-gqa", tokenizer), tmp_path / "run")
    command = ["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--format", "gguf"]
    settings = gguf_file._add_settings

    def broken(writer: Any, architecture: Any, cfg: Any, kind: Any) -> None:
        settings(writer, architecture, cfg.model_copy(update={"rope_theta": 20_000.0}), kind)

    for attribute, value, words in (
        ("_add_settings", broken, "llama.rope.freq_base was written as 20000.0 where the model has 10000.0"),
        ("to_neighbours", lambda rows, n_heads: rows, "blk.0.attn_q.weight is not the tensor"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(gguf_file, attribute, value)
            with pytest.raises(SystemExit) as end:
                main(command)
        assert end.value.code == 1 and words in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": {"score": "sigmoid", "scale": 9.0}}, "glm4moe.expert_weights_scale was written as 9.0 "),
        ({"router": {"score": "sigmoid", "scale": 2.5, "normalize": False}}, "glm4moe.expert_weights_norm"),
        ({"n_dense_layers": 0, "d_ff": None}, "glm4moe.feed_forward_length"),
        ({"n_shared_experts": 5}, "glm4moe.expert_shared_count was written as 5 where the model has 1"),
        ({"seq_len": 99}, "glm4moe.context_length was written as 99 where the model has 41"),
    ],
)
def test_gguf_of_other_glm_settings_is_caught(
    changes: dict[str, Any], words: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = variant_weights("glm4-all", tokenizer)
    settings = gguf_file._add_settings
    other = type(weights.cfg).model_validate({**weights.cfg.model_dump(), **changes})
    monkeypatch.setattr(
        gguf_file, "_add_settings", lambda writer, name, cfg, kind: settings(writer, name, other, kind)
    )
    path = gguf_file.write_gguf(weights, "glm4_moe", tmp_path, kind=gguf_file.Kind.F32)
    with pytest.raises(ExportError, match=re.escape(words)):
        read_back_gguf(path, weights, "glm4_moe", gguf_file.Kind.F32)


def test_gguf_of_other_pieces_is_caught(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = variant_weights("mixtral-gqa", tokenizer)
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "is_byte", lambda self, i: False)
    path = gguf_file.write_gguf(weights, "mixtral", tmp_path, kind=gguf_file.Kind.F32)
    monkeypatch.undo()
    with pytest.raises(ExportError, match="tokenizer.ggml.token_type was written as"):
        read_back_gguf(path, weights, "mixtral", gguf_file.Kind.F32)


def expected(n_tokens: int = 40, **changes: Any) -> Expected:
    logits = torch.randn(n_tokens, 5, generator=torch.Generator().manual_seed(0))
    return replace(Expected((logits,), (torch.ones(n_tokens, dtype=torch.bool),), None), **changes)


def test_nan_and_infinity_do_not_pass(tokenizer: Path) -> None:
    held_out, want = random_tokens(variant_weights("mixtral-gqa", tokenizer).cfg), expected()
    assert "largest logit difference 0 " in check_logits(want.logits, want, client="it", held_out=held_out)
    for value in (torch.nan, torch.inf, float(want.logits[0][7, 2]) + 2e-4):
        found = want.logits[0].clone()
        found[7, 2] = value
        with pytest.raises(ExportError, match="it computes another model"):
            check_logits([found], want, client="it", held_out=held_out)
    few = replace(want, is_clear=(first(MIN_COMPARED, 40),))
    assert f"over {MIN_COMPARED} of 40 tokens" in check_logits(
        want.logits, few, client="it", held_out=held_out
    )


def first(n: int, n_tokens: int) -> Tensor:
    return torch.arange(n_tokens) < n


@pytest.mark.parametrize(
    ("n_clear", "lengths", "fault"),
    [
        (32, [40], None),
        (31, [40], "only 31 of 40 where 32 are needed"),
        (8, [8], None),
        (25, [50] * 20, None),
        (2, [50] * 20, "only 40 of 1000 where 50 are needed"),
        (40, [40, 5000], None),
        (31, [40, 5000], "only 31 of 40 where 32 are needed"),
    ],
)
def test_enough_has_to_be_compared(n_clear: int, lengths: list[int], fault: str | None) -> None:
    """Only tokens of short rows count: a long row is there for the window alone."""
    assert shortage(expected(is_clear=tuple(first(n_clear, n) for n in lengths))) == fault


def test_other_rows_are_tried_where_the_first_have_too_few_clear_tokens(tokenizer: Path) -> None:
    weights, n_tried = variant_weights("mixtral-window", tokenizer), 0
    held_out = random_tokens(weights.cfg)

    def tied_up_to(n: int) -> Callable[..., Expected]:
        def synthetic(_: Any, rows: Sequence[Tensor]) -> Expected:
            nonlocal n_tried
            n_tried += 1
            return expected(is_clear=tuple(first(41 if n_tried > n else 1, len(row)) for row in rows))

        return synthetic

    used, _ = choose_rows(weights, None, tied_up_to(2))
    assert n_tried == 3 and not torch.equal(used.rows[0], held_out.rows[0])
    with pytest.raises(ExportError, match="any of 5 sets of rows: only 25 of 1025 where 52 are needed"):
        choose_rows(weights, None, tied_up_to(99))


def test_a_corpus_that_can_no_longer_be_read_is_replaced_by_random_tokens(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"text": make_texts(300)}, valid_frac=0.5)
    cfg = tiny_config(vocab_size=corpus.load_tokenizer().vocab_size)
    assert held_out_tokens(cfg, corpus).description.startswith("held-out text of ")
    gone = open_corpus(corpus.path, verify="size")
    for shard in (corpus.path / "valid").iterdir():
        shard.unlink()
    assert held_out_tokens(cfg, gone).description == "pseudo-random tokens"


@pytest.mark.parametrize(
    ("seq_len", "window", "lengths"),
    [
        (41, None, [41] * 25),
        (41, 7, [41] * 25),
        (4096, 30, [128] * 8),
        (4096, 100, [128] * 8 + [164]),
        (8192, 4096, [128] * 8 + [5120]),
        (4300, 4096, [128] * 8 + [4300]),
        (1 << 20, 1 << 16, [128] * 8),
    ],
)
def test_a_long_window_gets_a_row_that_is_longer(
    seq_len: int, window: int | None, lengths: list[int]
) -> None:
    assert row_lengths(tiny_config(seq_len=seq_len, sliding_window=window)) == lengths


def test_a_window_must_be_seen_to_hide_something(tokenizer: Path) -> None:
    """Some tokens past the window must agree, whether or not a tie came before them."""
    weights = variant_weights("mixtral-window", tokenizer)
    held_out = random_tokens(weights.cfg)
    want = expected_logits(weights, held_out.rows)
    said = check_logits(want.logits, want, client="it", held_out=held_out)
    assert said.endswith("; 425 of 425 well past the sliding window agree")
    weights.cfg = weights.cfg.model_copy(update={"sliding_window": None})
    blind = expected_logits(weights, held_out.rows).logits
    tied = replace(want, is_clear=tuple(first(7, 41) for _ in held_out.rows))
    with pytest.raises(ExportError, match="only 0 of 425 tokens past the sliding window of 7 agree where 8"):
        check_logits(blind, tied, client="it", held_out=held_out)
    assert "425 of 425" in check_logits(want.logits, tied, client="it", held_out=held_out)
    long = replace(want, window=9000)
    assert "window of 9,000 is too long to be tried" in check_logits(
        want.logits, long, client="it", held_out=held_out
    )


def test_tokens_after_a_tie_do_not_count(tokenizer: Path) -> None:
    """Two experts with the same router row tie: after either was the last chosen, nothing is compared."""
    weights = variant_weights("mixtral-gqa", tokenizer)
    rows = random_tokens(weights.cfg).rows
    clear = torch.stack(expected_logits(weights, rows).is_clear)
    assert clear.float().mean() > 0.9
    assert clear_frac_with_a_tie(weights, rows) < clear.float().mean() / 2


def clear_frac_with_a_tie(weights: DecoderWeights, rows: Sequence[Tensor]) -> float:
    router = weights.parameters["blocks.1.moe.router.weight"]
    router[3] = router[2]
    is_clear = torch.stack(expected_logits(weights, rows).is_clear)
    assert (is_clear.long().diff(dim=1) <= 0).all(), "after a tie a row stays unclear"
    return float(is_clear.float().mean())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("tied", "raised", "is_close"),
    [
        pytest.param(None, None, False, id="none"),
        pytest.param((0, 1), None, False, id="two that are chosen"),
        pytest.param((1, 2), None, True, id="the last chosen and the first left out"),
        pytest.param((2, 3), None, False, id="two that are left out"),
        pytest.param((1, 2), 1, False, id="a tie that the bias undoes"),
        pytest.param(None, 2, True, id="a tie that the bias makes"),
    ],
)
def test_a_tie_is_of_the_last_chosen_expert_and_the_first_left_out(
    tied: tuple[int, int] | None, raised: int | None, is_close: bool, score: str
) -> None:
    """raised: the expert with a bias, which makes the second and third expert tie, or undoes their tie."""
    decoder = tiny_decoder(tiny_config(router={"score": score}), dtype=torch.float32)
    router = next(module for module in decoder.modules() if isinstance(module, Router))
    assert (router.cfg.n_experts, router.cfg.top_k) == (6, 2)
    logits_E = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0])
    if tied is not None:
        logits_E[tied[1]] = logits_E[tied[0]]
    scores_E = logits_E.softmax(0) if score == "softmax" else logits_E.sigmoid()
    bias_E = torch.zeros(6)
    if raised is not None:
        bias_E[raised] = scores_E[1] - scores_E[2] if tied is None else 0.01
    with torch.no_grad():
        router.weight.copy_(torch.eye(6, 16))
        assert _is_close(router, torch.cat([logits_E, torch.zeros(10)])[None], bias_E).tolist() == [is_close]


def test_a_bias_with_other_values_is_found(tokenizer: Path, tmp_path: Path) -> None:
    """They differ by one bit, which no logit shows."""
    true, false = variant_weights("glm4-all", tokenizer), variant_weights("glm4-all", tokenizer)
    false.bias_ME[1, 2] = false.bias_ME[1, 2].nextafter(torch.tensor(torch.inf))
    huggingface.write_huggingface(false, "glm4_moe", tmp_path, dtype=torch.float32)
    assert "bit for bit" in read_back_huggingface(tmp_path, false)
    with pytest.raises(ExportError, match="the routers' bias was written with other values"):
        read_back_huggingface(tmp_path, true)


def test_held_out_text_is_used_where_there_is_enough(tmp_path: Path, tokenizer: Path) -> None:
    cfg = variant_weights("mixtral-gqa", tokenizer).cfg
    rich = make_corpus(tmp_path / "rich", {"a": make_texts(200)}, valid_frac=0.3)
    held_out = held_out_tokens(cfg, rich)
    assert [len(row) for row in held_out.rows] == [41] * 25
    assert held_out.description == f"held-out text of {rich.path}"
    stream = rich.split("valid")[0]
    assert torch.cat(held_out.rows).tolist() == stream.read(0, 25 * 41).tolist()
    poor = make_corpus(tmp_path / "poor", {"a": make_texts(20)}, valid_frac=0.1)
    for too_little in (poor, None):
        assert held_out_tokens(cfg, too_little).description == "pseudo-random tokens"


def test_held_out_text_comes_from_the_corpus_of_the_training(tokenizer: Path, tmp_path: Path) -> None:
    """A corpus that has replaced it at its path is not used: the run may have trained on that text."""
    corpus = make_corpus(tmp_path / "mine", {"a": make_texts(20)}, valid_frac=0.1)
    weights = variant_weights("mixtral-gqa", tokenizer)
    config = to_toml(run_config_of(weights.cfg, data={"corpus": str(corpus.path)})).encode()
    files = {"config.toml": config, "tokenizer.model": tokenizer.read_bytes()}
    found = {}
    for corpus_hash in (corpus.manifest.corpus_hash, "f" * 64):
        attached = Attached(DataIdentity(corpus_hash=corpus_hash, tokenizer_sha256="t"), files)
        path = write_first_checkpoint(weights, tmp_path / corpus_hash, attached)
        found[corpus_hash] = corpus_of(CheckpointWeights(path, weights.cfg)) is not None
    assert found == {corpus.manifest.corpus_hash: True, "f" * 64: False}
    assert corpus_of(weights) is None


def test_an_export_never_replaces_what_exists(tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"), publish(out):
        raise AssertionError("it is refused before anything is written")
    out.rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match="exists already"), publish(out):
        (tmp_path / "kept").rename(out)
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "precious"
