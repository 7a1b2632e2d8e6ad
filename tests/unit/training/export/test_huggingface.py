"""Exported directories: transformers computes what our model computes, for every shape it can hold."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.exports import VARIANTS, differing, save_weights, variant_config, variant_weights
from tests.models import tiny_config
from tests.unit.data_fixtures import write_tokenizer
from turnout.launch.cli.main import main
from turnout.launch.commands.export import run_export
from turnout.launch.models import open_weights
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.weights import load_decoder, parameter_shapes
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.export import reader
from turnout.training.export.hf_config import choose_architecture, from_hf_config, to_hf_config
from turnout.training.export.huggingface import slots, write_huggingface
from turnout.training.export.reader import HfWeights


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same(name: str, tokenizer: Path, tmp_path: Path) -> None:
    weights = variant_weights(name, tokenizer)
    checkpoint = save_weights(weights, tmp_path / "run")
    run_export(checkpoint, out := tmp_path / "out", "hf", "float32")
    assert json.loads((out / "config.json").read_text())["model_type"] == VARIANTS[name][0]
    # The gate has already compared them; this comparison shares only our decoder with it.
    tokens = torch.randint(
        weights.cfg.vocab_size, (3, weights.cfg.seq_len), generator=torch.Generator().manual_seed(5)
    )
    decoder, state = load_decoder(weights)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        hidden, _ = decoder(
            tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool), state
        )
        logits, want = model(tokens).logits, decoder.logits(hidden)
    assert not any((info if isinstance(info, dict) else vars(info)).values())
    assert want.std() > 0.5
    assert float((logits - want).abs().max()) < 1e-4
    assert differing(HfWeights(out), weights) == []
    assert HfWeights(out).cfg == without_balance(weights.cfg)


def without_balance(cfg: ModelConfig) -> ModelConfig:
    return ModelConfig.model_validate({**cfg.model_dump(), "balance": {}})


@pytest.mark.parametrize("name", VARIANTS)
def test_each_parameter_has_a_slot(name: str) -> None:
    cfg, (architecture, *_) = variant_config(name), VARIANTS[name]
    found: dict[str, int] = {}
    all_slots = list(slots(architecture, cfg))
    assert len({slot.name for slot in all_slots}) == len(all_slots)
    filling = [slot for slot in all_slots if slot.kind == "parameter" and slot.name != "lm_head.weight"]
    assert len({(slot.ours, slot.index, slot.half) for slot in filling}) == len(filling)
    for slot in filling:
        found[slot.ours] = found.get(slot.ours, 0) + prod(slot.shape)
    shapes = parameter_shapes(cfg)
    assert found == {name: prod(shape) for name, shape in shapes.items() if name != "head.weight"}
    assert choose_architecture(cfg, has_bias=VARIANTS[name][2] > 0) == architecture
    tree = to_hf_config(architecture, cfg, dtype="float32", bos_id=1, eos_id=2)
    found_cfg = from_hf_config(tree, "here")[1]
    undone = {"tie_embeddings": cfg.tie_embeddings, "n_shared_experts": cfg.n_shared_experts}
    assert found_cfg.model_copy(update=undone) == without_balance(cfg)


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_that_two_versions_spell_differently_are_written_both_ways(name: str) -> None:
    """For transformers 4 and 5, and for both names of the number of experts."""
    cfg, (architecture, *_) = variant_config(name), VARIANTS[name]
    tree = to_hf_config(architecture, cfg, dtype="bfloat16", bos_id=1, eos_id=2)
    rope = tree["rope_parameters"]
    assert tree["rope_theta"] == rope["rope_theta"] == cfg.rope_theta
    assert tree["torch_dtype"] == tree["dtype"] == "bfloat16"
    assert tree["num_experts"] == tree["num_local_experts"] == cfg.n_experts
    if architecture == "glm4_moe":
        assert tree["partial_rotary_factor"] == rope["partial_rotary_factor"] == 1.0
        assert tree["n_routed_experts"] == cfg.n_experts


def test_settings_that_an_older_config_lacks_are_filled_in() -> None:
    """Version 4 has no rope_parameters; many configs have neither head_dim nor num_key_value_heads."""
    cfg = variant_config("mixtral-mha-tied").model_copy(update={"rope_theta": 5e5, "tie_embeddings": False})
    tree = to_hf_config("mixtral", cfg, dtype="float32", bos_id=1, eos_id=2)
    left_out = {"rope_parameters", "num_key_value_heads", "initializer_range", "tie_word_embeddings"}
    found = from_hf_config({key: tree[key] for key in tree.keys() - left_out}, "here")[1]
    assert found == without_balance(cfg) and found.n_kv_heads == found.n_heads
    found = from_hf_config({key: tree[key] for key in tree.keys() - {"head_dim"}}, "here")[1]
    assert found.d_head == cfg.d_model // cfg.n_heads != cfg.d_head


def test_shards_hold_each_tensor_once(tokenizer: Path, tmp_path: Path) -> None:
    weights = variant_weights("glm4-all", tokenizer)
    (out := tmp_path / "out").mkdir()
    write_huggingface(weights, "glm4_moe", out, dtype=torch.bfloat16, max_shard_bytes=40_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    held, n_bytes = [], 0
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                held.append(name)
                n_bytes += tensor.numel() * tensor.element_size()
                assert index["weight_map"][name] == file
                assert (tensor.dtype == torch.float32) == name.endswith("e_score_correction_bias")
    assert sorted(held) == sorted(index["weight_map"]) and n_bytes == index["metadata"]["total_size"]


def test_bfloat16_is_proven_with_the_rounded_values(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_weights(variant_weights("glm4-all", tokenizer), tmp_path / "run")
    run_export(checkpoint.parents[1], out := tmp_path / "out", "hf", "bfloat16")
    said = capsys.readouterr()
    assert "computes the same: largest logit difference" in said.out and "pseudo-random tokens" in said.out
    assert "intact" in said.err
    card = (out / "README.md").read_text()
    assert "glm4_moe" in card and "bfloat16" in card and "| step | 0 |" in card
    recipe = (checkpoint / "config.toml").read_text()
    assert "\n".join(f"    {line}".rstrip() for line in recipe.splitlines()) in card.replace("    \n", "\n")
    want = variant_weights("glm4-all", tokenizer)
    for name in parameter_shapes(want.cfg):
        assert torch.equal(HfWeights(out).read(name), want.read(name).bfloat16().float()), name


@pytest.mark.parametrize(
    ("changes", "bias", "message"),
    [
        (
            {"router": {"normalize": False}},
            False,
            "nearest is mixtral.*sum to 1 .model.router.normalize=true",
        ),
        ({"n_shared_experts": 1, "qk_norm": True}, False, "nearest is qwen3_moe.*n_shared_experts=0"),
        (
            {"sliding_window": 5, "router": {"score": "sigmoid"}},
            False,
            "glm4_moe, but.*sliding_window=none",
        ),
        ({"router": {"n_groups": 2}}, False, "nearest is mixtral.*n_groups=1"),
        ({"router": {"capacity_factor": 1.5}}, False, "capacity_factor=none"),
        ({"router": {"scale": 2.0}}, False, "model.router.scale=1.0"),
        ({}, True, "bias_rate=0 from the first step on"),
    ],
)
def test_a_model_that_no_architecture_holds_is_refused(changes: dict, bias: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_architecture(tiny_config(**changes), has_bias=bias)


def test_wrong_uses_end_in_one_line(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_weights(variant_weights("mixtral-gqa", tokenizer), tmp_path / "run")
    (tmp_path / "there").mkdir()
    command = ["export", "--checkpoint", str(checkpoint)]
    cases = {
        ("--out", str(tmp_path / "there"), "--format", "hf"): (2, "exists already"),
        ("--out", str(tmp_path / "new"), "--format", "hf", "--dtype", "q8_0"): (2, "use --format gguf"),
        ("--out", str(tmp_path / "new"), "--format", "onnx"): (2, "Invalid value"),
    }
    for arguments, (code, words) in cases.items():
        with pytest.raises(SystemExit) as end:
            main([*command, *arguments])
        said = capsys.readouterr().err
        assert end.value.code == code and words in said and len(said.splitlines()) == 1
    (checkpoint / "rank-00000.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="rank-00000"):
        run_export(checkpoint, tmp_path / "new", "hf", "float32")
    assert not (tmp_path / "new").exists()


def test_unsupported_directories_are_refused_with_the_setting(tokenizer: Path, tmp_path: Path) -> None:
    weights = variant_weights("qwen3-gqa", tokenizer)
    (out := tmp_path / "out").mkdir()
    write_huggingface(weights, "qwen3_moe", out, dtype=torch.float32)
    config = json.loads((out / "config.json").read_text())
    assert open_weights(out).cfg == weights.cfg
    cases = {
        "hidden_act": ("gelu", "hidden_act is 'gelu'"),
        "attention_bias": (True, "attention_bias is True"),
        "rope_parameters": ({"rope_type": "yarn"}, "rope_type is 'yarn'"),
        "model_type": ("gpt2", "model_type 'gpt2' cannot be read"),
        "mlp_only_layers": ([1], "are not the first layers"),
        "hidden_size": ("wide", "describes a model that Turnout cannot train"),
        "quantization_config": ({"bits": 4}, "quantization_config"),
    }
    for key, (value, message) in cases.items():
        (out / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ConfigError, match=message):
            HfWeights(out)
    (out / "config.json").write_text(json.dumps({**config, "num_experts": 5, "num_local_experts": 5}))
    with pytest.raises(CheckpointError, match=r"experts\.5\.down_proj.*no tensor of|is \(6, 64\) where"):
        HfWeights(out)


def test_opening_computes_the_shapes_once(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time builds the model on the meta device; once per tensor would take minutes."""
    write_huggingface(
        variant_weights("mixtral-mha-tied", tokenizer), "mixtral", tmp_path, dtype=torch.float32
    )
    n_asked = 0

    def counted(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        nonlocal n_asked
        n_asked += 1
        return parameter_shapes(cfg)

    monkeypatch.setattr(reader, "parameter_shapes", counted)
    assert HfWeights(tmp_path).cfg.tie_embeddings
    assert n_asked == 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    weights = variant_weights("mixtral-gqa", write_tokenizer(tmp_path, vocab_size=310))
    checkpoint = save_weights(weights, tmp_path / "run")
    for to in ("hf", "gguf"):
        with pytest.raises(CheckpointError, match="has 310 tokens where the model has 300"):
            run_export(checkpoint, tmp_path / "out", to, "float32")
