"""Import reverses export bit for bit, and experts made of a dense model compute what it computes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tests.exports import VARIANTS, differing, run_config_of, variant_weights
from tests.models import tiny_config
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.launch.cli.main import main
from turnout.launch.commands.import_ import imported_model
from turnout.launch.run_dir import has_run, read_config
from turnout.launch.settings import to_toml
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.directory import checkpoint_path, verify_checkpoint
from turnout.training.checkpoint.weights import CheckpointWeights, load_decoder
from turnout.training.export import reader
from turnout.training.export.hf_config import Architecture
from turnout.training.export.huggingface import Slot, slots, write_huggingface


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"a": make_texts(200)}, valid_frac=0.3)


def recipe(directory: Path, model: ModelConfig, corpus: Corpus) -> Path:
    """Write a recipe of another model with the same length and routing; import ignores its model sizes."""
    other = {"n_layers": model.n_layers + 1, "d_model": 8, "vocab_size": 999}
    cfg = run_config_of(model.model_copy(update=other), data={"corpus": str(corpus.path)})
    (path := directory / "recipe.toml").write_text(to_toml(cfg))
    return path


def run(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


@pytest.mark.parametrize(
    "name", ["mixtral-mha-tied", "mixtral-window", "qwen3-dense-not-normalised", "glm4-all"]
)
def test_import_of_an_export_is_the_checkpoint(
    name: str, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = variant_weights(name, corpus.tokenizer_path)
    (source := tmp_path / "hf").mkdir()
    write_huggingface(weights, VARIANTS[name][0], source, dtype=torch.float32, max_shard_bytes=100_000)
    recipe_file = recipe(tmp_path, weights.cfg, corpus)
    imported = tmp_path / "imported"
    code = run(
        "import", recipe_file, "--from", source, "--run-dir", imported, "--set", "model.balance.coef=0.5"
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "computes the same" in said.out and "held-out text" in said.out
    assert has_run(imported)
    path = checkpoint_path(imported, 0)
    cfg = read_config(path)
    assert cfg == read_config(imported) and cfg.model.balance.coef == 0.5
    assert cfg.model.model_copy(update={"balance": weights.cfg.balance}) == weights.cfg
    assert verify_checkpoint(path).kinds == ("master",)
    assert differing(CheckpointWeights(path, cfg.model), weights) == []
    loads = load_file(path / "router.safetensors")["load_frac"]
    assert torch.equal(loads, torch.full_like(loads, 1 / cfg.model.n_experts))


def test_an_import_that_computes_another_model_is_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two experts were swapped while it was read."""
    weights = variant_weights("mixtral-gqa", corpus.tokenizer_path)
    (source := tmp_path / "hf").mkdir()
    write_huggingface(weights, "mixtral", source, dtype=torch.float32)
    recipe_file = recipe(tmp_path, weights.cfg, corpus)

    def swapped(architecture: Architecture, cfg: ModelConfig) -> Iterator[Slot]:
        for slot in slots(architecture, cfg):
            is_swapped = slot.ours == "blocks.1.moe.experts.down" and slot.index in (2, 3)
            yield replace(slot, index=5 - (slot.index or 0)) if is_swapped else slot

    monkeypatch.setattr(reader, "slots", swapped)
    before = set(tmp_path.iterdir())
    assert run("import", recipe_file, "--from", source, "--run-dir", tmp_path / "new") == 1
    assert "computes another model: largest logit difference" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("window", "seq_len", "kept"),
    [(7, 41, 7), (7, 8, 7), (7, 7, None), (7, 5, None), (None, 8, None)],
    ids=["shorter", "shorter by one", "as long", "longer", "none"],
)
def test_a_window_is_kept_only_if_it_hides_something(
    window: int | None, seq_len: int, kept: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tiny_config(seq_len=41, sliding_window=window, n_experts=7)
    wanted = tiny_config(seq_len=seq_len, balance={"coef": 0.5}, d_model=24)
    got = imported_model(found, wanted)
    assert got == tiny_config(seq_len=seq_len, balance={"coef": 0.5}, sliding_window=kept, n_experts=7)
    assert ("left out" in capsys.readouterr().out) == (kept != window)


def dense_model(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
        **changes,
    }
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).float().eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).float().eval()


@pytest.mark.parametrize(("kind", "is_tied"), [("llama", True), ("qwen3", False)])
def test_upcycled_model_computes_what_the_dense_one_does(
    kind: str, is_tied: bool, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_model(kind, tie_word_embeddings=is_tied)
    dense.save_pretrained(source := tmp_path / "dense")
    (source / "tokenizer.model").write_bytes(corpus.tokenizer_path.read_bytes())
    recipe_file = recipe(tmp_path, variant_weights("mixtral-gqa", corpus.tokenizer_path).cfg, corpus)
    imported = tmp_path / "run"
    command = ["import", recipe_file, "--from", source, "--run-dir", imported]
    assert run(*command) == 2 and "--upcycle N_EXPERTS" in capsys.readouterr().err
    assert run(*command, "--upcycle", 5) == 0, capsys.readouterr().err
    path = checkpoint_path(imported, 0)
    weights = CheckpointWeights(path, read_config(path).model)
    cfg = weights.cfg
    assert (cfg.n_experts, cfg.top_k, cfg.seq_len, cfg.tie_embeddings) == (5, 2, 41, is_tied)
    decoder, state = load_decoder(weights)
    tokens = torch.randint(300, (2, 41), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, stats = decoder(
            tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool), state
        )
        want, got = dense(tokens).logits, decoder.logits(hidden)
    assert want.std() > 0.5
    assert float((got - want).abs().max()) < 1e-4
    assert (stats.counts_E > 0).all(), "the routers are random, so every expert gets rows"
    first = weights.read("blocks.1.moe.experts.down", 0)
    assert torch.equal(first, dense.state_dict()["model.layers.1.mlp.down_proj.weight"])
    assert all(torch.equal(weights.read("blocks.1.moe.experts.down", i), first) for i in range(5))


def test_upcycled_routers_are_random_by_the_seed_and_differ_by_layer(corpus: Corpus, tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(source := tmp_path / "dense")
    (source / "tokenizer.model").write_bytes(corpus.tokenizer_path.read_bytes())
    recipe_file = recipe(tmp_path, variant_weights("mixtral-gqa", corpus.tokenizer_path).cfg, corpus)

    def routers(name: str, seed: int) -> list[torch.Tensor]:
        command = ["import", recipe_file, "--from", source, "--upcycle", 5, "--run-dir", tmp_path / name]
        assert run(*command, "--set", f"train.seed={seed}") == 0
        path = checkpoint_path(tmp_path / name, 0)
        weights = CheckpointWeights(path, read_config(path).model)
        return [weights.read(f"blocks.{layer}.moe.router.weight") for layer in range(2)]

    first, again, other = routers("first", 1), routers("again", 1), routers("other", 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for one, another in ((first[0], first[1]), (first[0], other[0]), (first[1], other[1])):
        # Independent values with standard deviation 0.2, the model's initializer_range.
        assert float((one - another).std()) == pytest.approx(0.2 * 2**0.5, rel=0.3)


def test_an_impossible_import_ends_in_one_line(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_model("llama").save_pretrained(dense := tmp_path / "dense")
    (dense / "tokenizer.model").write_bytes(corpus.tokenizer_path.read_bytes())
    weights = variant_weights("mixtral-gqa", corpus.tokenizer_path)
    (source := tmp_path / "hf").mkdir()
    write_huggingface(weights, "mixtral", source, dtype=torch.float32)
    recipe_file = recipe(tmp_path, weights.cfg, corpus)
    capsys.readouterr()
    upcycle = ["--from", dense, "--upcycle", 4, "--set"]
    sized = [
        "--set",
        "model.seq_len=82",
        "--set",
        "train.batch_tokens=164",
        "--set",
        "train.microbatch_seqs=1",
    ]
    cases: list[tuple[list[object], str]] = [
        (["--from", source, *sized], "model.seq_len=82 is more than the 41 positions"),
        (["--from", source, "--upcycle", 4], "'mixtral' cannot be upcycled; use one of ['llama', 'qwen3']"),
        ([*upcycle, "model.router.normalize=false"], "use model.router.normalize=true"),
        ([*upcycle, "model.router.scale=2.0"], "use model.router.scale=1.0"),
        (["--from", dense, "--upcycle", 1], "must be at least 2"),
        ([*upcycle, "model.top_k=5"], "--upcycle 4: each token uses model.top_k=5 experts"),
        ([*upcycle, "model.n_shared_experts=1"], "--set model.n_shared_experts has no effect"),
        (["--from", source, "--set", "model.rope_theta=1e6"], "--set model.rope_theta has no effect"),
        (["--from", source, "--set", "model.top_k=1"], "only model.seq_len, model.balance from the recipe"),
        (["--from", tmp_path], "config.json"),
    ]
    for words, message in cases:
        code, said = (
            run("import", recipe_file, "--run-dir", tmp_path / "new", *words),
            capsys.readouterr().err,
        )
        assert code in (2, 4) and message in said and len(said.splitlines()) == 1, said
        assert not (tmp_path / "new").exists()
    (source / "tokenizer.model").write_bytes(b"another")
    (source / "tokenizer.json").write_bytes(b"another")
    assert run("import", recipe_file, "--run-dir", tmp_path / "new", "--from", source) == 2
    assert "prepare a corpus with --tokenizer" in capsys.readouterr().err
