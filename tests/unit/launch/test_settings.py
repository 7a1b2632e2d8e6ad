"""Reading recipes and `--set`, and the one-line errors about wrong settings."""

import importlib.util
import shutil
from pathlib import Path
from typing import get_args

import pytest
import tomli_w
import torch

from turnout.launch.preflight import check_kernels, check_machine
from turnout.launch.run_dir import read_config
from turnout.launch.settings import check_config, load_config, recipe_names, setting_paths, to_toml
from turnout.moe.experts.experts import EXPERT_BACKENDS
from turnout.moe.experts.requirements import REQUIREMENTS
from turnout.training.config.train import TrainConfig
from turnout.training.errors import ConfigError
from turnout.training.renames import SETTINGS

OLD_RUN = Path(__file__).parents[2] / "old_run" / "a31d440" / "run"
CORPUS_TOML = 'data = { corpus = "x" }\n'


def test_every_packaged_recipe_validates_and_survives_being_written(tmp_path) -> None:
    assert {"tiny", "small", "olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b"} == set(recipe_names())
    for name in recipe_names():
        cfg = load_config(name)
        written = tmp_path / f"{name}.toml"
        written.write_text(to_toml(cfg))
        assert load_config(str(written)) == cfg


def test_set_overrides_a_value_and_none_unsets_it() -> None:
    cfg = load_config("tiny", ["train.n_steps=77", "model.balance.scope=batch", "train.clip_norm=none"])
    assert (cfg.train.n_steps, cfg.model.balance.scope, cfg.train.clip_norm) == (77, "batch", None)
    cfg = load_config("tiny", ["optim.betas=[0.8, 0.99]", "data.corpus=some/dir", 'sample.prompts=["a=b"]'])
    assert (cfg.optim.betas, cfg.data.corpus, cfg.sample.prompts) == ((0.8, 0.99), "some/dir", ("a=b",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_layer=3", r"--set model.n_layer: no such setting; did you mean model.n_layers\?"),
        ("lr=1", r"did you mean optim.lr\?"),
        ("model.zzzzzz=1", "there are model.n_layers, "),
        ("zzzzzz=1", "there are checkpoint, data, eval, guard, log, model"),
        ("train.n_steps", "is not path=value"),
        ("train.n_steps=many", "recipe tiny: train.n_steps='many': input should be a valid integer"),
        ("train.n_steps=0", "train.n_steps=0: input should be greater than 0"),
        ("model.top_k=9", r"top_k=9 is more than n_experts=8; use 1 to 8"),
        ("model.n_kv_heads=3", r"n_kv_heads=3 must divide n_heads=4; use one of \[1, 2, 4\]"),
        ("model.router.n_groups=3", r"router.n_groups=3 must divide n_experts=8; use one of \[1, 2, 4, 8\]"),
        ("model.router.top_groups=2", "router.top_groups=2 is more than router.n_groups=1"),
        ("model.top_k=1", "set router.normalize=false"),
        ("model.n_dense_layers=2", "n_dense_layers=2 needs d_ff"),
        ("model.d_ff=64", "d_ff=64 has no effect without dense layers"),
        ("model.sliding_window=4096", "sliding_window=4096 hides nothing"),
        ("model.d_head=33", "d_head=33 must be even"),
        ("train.batch_tokens=1000", r"use 768 or 1024"),
        ("optim.schedule.warmup_steps=100000", "must be below train.n_steps"),
        ("optim.schedule.kind=wsd", "kind=wsd needs decay_frac"),
        ("optim.schedule.decay_frac=0.5", "has no effect with kind=cosine"),
        ("optim.betas=[0.9, 1.0]", "betas=.* must each be at least 0 and below 1"),
        ("train.precision=fp8", "input should be 'fp32', 'bf16' or 'fp16'"),
        ("parallel.zero_stage=3", "input should be 1 or 2"),
        ("data.corpus=none", "data.corpus: is required"),
        ("sample.n_tokens=9999", "sample.n_tokens=9999 must be below model.seq_len"),
    ],
)
def test_wrong_settings_are_refused_with_path_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("old", "new"), SETTINGS.items(), ids=SETTINGS.keys())
def test_an_old_name_that_a_person_writes_is_refused_with_the_new_one(
    old: str, new: str, tmp_path: Path
) -> None:
    message = rf"{old}: no such setting; it is now called {new}$"
    with pytest.raises(ConfigError, match=f"--set {message}"):
        load_config("tiny", [f"{old}=2"])
    section, _, name = old.rpartition(".")
    tree = load_config("tiny").model_dump(mode="json", exclude_none=True)
    tree[section][name] = tree[section].pop(new.rpartition(".")[2])
    recipe = tmp_path / "config.toml"
    recipe.write_text(tomli_w.dumps(tree))
    with pytest.raises(ConfigError, match=rf"config\.toml: {message}"):
        load_config(str(recipe))


def test_the_config_of_a_run_of_an_earlier_release_is_read_with_todays_names(tmp_path: Path) -> None:
    for directory in (OLD_RUN, *(OLD_RUN / "checkpoints").glob("step-*")):
        written = (directory / "config.toml").read_text()
        assert "ep_trips = 2\n" in written and "is_async = true\n" in written
        cfg = load_config(str(directory / "config.toml"), ["train.n_steps=24"])
        assert (cfg.parallel.ep_chunks, cfg.checkpoint.async_save, cfg.train.n_steps) == (2, True, 24)
        assert load_config(str(directory / "config.toml")) == read_config(directory)
    # Apart from its run, it may be a person's.
    shutil.copy(OLD_RUN / "config.toml", tmp_path)
    with pytest.raises(ConfigError, match="it is now called parallel.ep_chunks"):
        load_config(str(tmp_path / "config.toml"))


# tiny: 8 experts, top 2, 600 steps, a checkpoint every 200.
SPIKE, COLLAPSE = "guard.on_spike=stop", "guard.on_collapse=stop"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guard.spike_sigma=3"], "guard: spike_sigma=3.0 has no effect with on_spike=off; set on_spike to"),
        (["guard.spike_window_steps=9", COLLAPSE], "spike_window_steps=9 has no effect with on_spike=off"),
        (
            ["guard.max_load_frac=0.4"],
            "max_load_frac=0.4 has no effect with on_collapse=off; set on_collapse",
        ),
        (["guard.max_dead_frac=0.5", SPIKE], "max_dead_frac=0.5 has no effect with on_collapse=off"),
        (["guard.collapse_patience_steps=9"], "collapse_patience_steps=9 has no effect with on_collapse=off"),
        (
            ["guard.skip_window_steps=2", "guard.on_spike=skip"],
            "skip_window_steps=2 .* without a rollback; set",
        ),
        (
            ["guard.max_interventions=2", SPIKE],
            "max_interventions=2 .* when nothing is skipped or rolled back",
        ),
        ([COLLAPSE], "on_collapse=stop needs max_load_frac, max_dead_frac or both; max_dead_frac=0.5 finds"),
        (["guard.on_collapse=skip"], "guard.on_collapse='skip': input should be 'off', 'stop' or 'rollback'"),
        (["guard.on_non_finite=off"], "input should be 'stop', 'skip' or 'rollback'"),
        ([SPIKE, "guard.spike_sigma=0"], "guard.spike_sigma=0: input should be greater than 0"),
        ([SPIKE, "guard.spike_sigma=inf"], "guard.spike_sigma=inf: input should be a finite number"),
        ([SPIKE, "guard.spike_window_steps=1"], "input should be greater than or equal to 2"),
        ([SPIKE, "guard.spike_window_steps=600"], "must be below train.n_steps=600, .* use at most 599"),
        ([COLLAPSE, "guard.max_dead_frac=0.5", "guard.collapse_patience_steps=601"], "use at most 600"),
        ([COLLAPSE, "guard.max_load_frac=0.5"], r"max_load_frac=0.5 must be .* below 0.5 \(1 / model.top_k"),
        ([COLLAPSE, "guard.max_load_frac=0.12"], "max_load_frac=0.12 must be at least 0.125"),
        (
            [COLLAPSE, "guard.max_dead_frac=0.75"],
            "max_dead_frac=0.75 must be below 0.75, because model.top_k=2",
        ),
        (
            ["guard.on_non_finite=rollback", "checkpoint.every_steps=none"],
            "on_non_finite=rollback needs a check",
        ),
        (
            ["guard.on_spike=rollback", "checkpoint.every_steps=none"],
            "guard.on_spike=rollback needs a checkp",
        ),
        (
            ["guard.on_collapse=rollback", "guard.max_dead_frac=0.5", "checkpoint.every_steps=600"],
            "on_collapse=rollback .*but checkpoint.every_steps=600; set .* below train.n_steps=600",
        ),
        (["checkpoint.keep_every_steps=500"], "checkpoint: keep_every_steps=500 must be .*; use 400 or 600"),
        (["checkpoint.keep_every_steps=50"], "keep_every_steps=50 must be a multiple .*; use 200$"),
        (
            ["checkpoint.keep_every_steps=200", "checkpoint.every_steps=none"],
            "keep_every_steps=200 has no effect without every_steps",
        ),
    ],
)
def test_wrong_settings_of_guard_and_checkpoint_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("tiny", overrides)
    assert "\n" not in str(caught.value)


def test_guard_settings_at_their_bounds_are_accepted() -> None:
    collapse = [COLLAPSE, "guard.max_load_frac=0.125", "guard.max_dead_frac=0.74"]
    steps = [
        "guard.collapse_patience_steps=600",
        "guard.spike_window_steps=599",
        "checkpoint.every_steps=599",
    ]
    load_config("tiny", [*collapse, *steps, "guard.on_spike=rollback", "checkpoint.keep_every_steps=1198"])


def test_only_active_guard_settings_have_a_value(tmp_path) -> None:
    overrides = ["guard.on_spike=skip", "guard.spike_window_steps=30"]
    guard = load_config("tiny", overrides).guard
    assert (guard.spike_sigma, guard.spike_window_steps, guard.max_interventions) == (6.0, 30, 5)
    assert (guard.skip_window_steps, guard.collapse_patience_steps, guard.max_dead_frac) == (None, None, None)
    unset = load_config("tiny", [SPIKE]).model_dump(mode="json")
    unset["guard"]["spike_sigma"] = None
    assert check_config(unset, "here").guard.spike_sigma == 6.0
    everything = [
        "guard.on_non_finite=rollback",
        SPIKE,
        "guard.on_collapse=rollback",
        "guard.max_dead_frac=0.5",
    ]
    cfg = load_config("tiny", everything)
    assert (cfg.guard.skip_window_steps, cfg.guard.collapse_patience_steps) == (1, 50)
    assert cfg.guard.max_load_frac is None
    written = tmp_path / "written.toml"
    written.write_text(to_toml(cfg))
    assert "spike_sigma = 6.0" in written.read_text()
    assert load_config(str(written)) == cfg == type(cfg).model_validate(cfg.model_dump())


@pytest.mark.parametrize("backend", ["torch_grouped", "megablocks"])
def test_misaligned_widths_are_refused_for_grouped_backends_only(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"expert_backend={backend} needs multiples of 8"):
        load_config("tiny", ["model.d_expert=100", f"train.expert_backend={backend}"])
    load_config("tiny", ["model.d_expert=100"])


def test_more_rows_than_kernels_can_index_are_refused() -> None:
    """A row's elements begin at index row x d_model, which must fit an int32: 2**31 elements are too many."""
    shape = ["model.seq_len=4096", "model.top_k=8", "model.n_experts=16", "model.d_model=4096"]
    batch = ["train.batch_tokens=65536", "train.expert_backend=megablocks", "train.microbatch_seqs=16"]
    with pytest.raises(ConfigError, match=r"gives 2,147,483,648; use at most 15, or"):
        load_config("tiny", [*shape, *batch])
    load_config("tiny", [*shape, *batch, "train.microbatch_seqs=8"])
    load_config("tiny", [*shape, *batch, "parallel.tp=2"])  # each rank then dispatches half of the tokens
    load_config("tiny", [*shape, *batch, "train.expert_backend=torch_grouped"])


def test_the_automatic_choice_respects_what_kernels_can_index() -> None:
    """2**31 elements of gate and up, with evenly spread rows or at a rank's cap, or 2**31 of weights."""
    rows = ["model.seq_len=4096", "model.top_k=8", "model.n_experts=16", "train.batch_tokens=524288"]

    def fits(*overrides: str) -> bool:
        return load_config("tiny", [*rows, "model.d_expert=2048", *overrides]).fits_int32("triton_grouped")

    assert fits("train.microbatch_seqs=8")
    assert not fits("train.microbatch_seqs=16")
    assert not fits("train.microbatch_seqs=16", "parallel.ep_max_load=0.4")  # caps sent rows; none are
    assert not fits("train.microbatch_seqs=8", "parallel.ep=2")  # parallel.ep_max_load=2
    assert fits("train.microbatch_seqs=8", "parallel.ep=2", "parallel.ep_max_load=1.5")
    wide = ["train.microbatch_seqs=1", "model.d_expert=65536", "model.d_model=1024", "model.seq_len=256"]
    assert not fits(*wide) and fits(*wide, "parallel.ep=2")


def test_half_precision_kernels_are_refused_for_fp32() -> None:
    with pytest.raises(ConfigError, match=r"would multiply fp32 as TF32; use train\.precision=bf16"):
        load_config("tiny", ["train.expert_backend=triton_grouped"])
    load_config("tiny", ["train.expert_backend=triton_grouped", "train.precision=fp16"])


def test_the_config_offers_exactly_the_backends_that_exist() -> None:
    known = get_args(TrainConfig.model_fields["expert_backend"].annotation)
    assert set(known) == {"auto", *EXPERT_BACKENDS} and REQUIREMENTS.keys() == EXPERT_BACKENDS.keys()


def test_the_error_names_an_unreadable_recipe(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"recipe 'tinny' does not exist; did you mean tiny\?"):
        load_config("tinny")
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load_config(str(tmp_path / "absent.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(str(broken))
    broken.write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 5\)"):
        load_config(str(broken))
    broken.write_text(CORPUS_TOML)
    with pytest.raises(ConfigError, match=r"model: is required.* \(and 2 more\)"):
        load_config(str(broken))


def test_setting_paths_include_the_names_that_scripts_rely_on() -> None:
    promised = """model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_head model.d_ff
        model.d_expert model.n_experts model.top_k model.n_shared_experts model.n_dense_layers
        model.vocab_size model.seq_len model.rope_theta model.qk_norm model.router.score
        model.router.normalize model.router.scale model.router.n_groups model.router.top_groups
        model.balance.coef model.balance.scope model.balance.z_coef model.balance.bias_rate parallel.tp
        parallel.ep parallel.zero_stage train.n_steps train.batch_tokens train.microbatch_seqs
        train.precision train.seed train.clip_norm optim.lr optim.betas optim.weight_decay
        optim.schedule.kind optim.schedule.warmup_steps data.corpus data.seed checkpoint.every_steps
        checkpoint.keep_last log.every_steps"""
    assert set(promised.split()) <= set(setting_paths())


@pytest.mark.parametrize(
    ("setting", "instead"),
    [("train.expert_backend=compiled_loop", "sorted_loop"), ("train.compile=true", "train.compile=false")],
)
def test_compiled_kernels_need_a_compiler(
    setting: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config("tiny", [setting])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ConfigError, match=rf"{setting} needs a C\+\+ compiler.*use {instead}$"):
        check_machine(cfg, 1)
    check_machine(load_config("tiny"), 1)


def test_what_is_compiled_needs_a_torch_in_a_path_without_a_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("torch", "/two words/torch/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for setting in ("train.expert_backend=compiled_loop", "train.compile=true"):
        with pytest.raises(ConfigError, match=rf"{setting}: torch is installed in '/two words/torch', and"):
            check_machine(load_config("tiny", [setting]), 1)
    check_machine(load_config("tiny"), 1)


def test_gpu_kernels_need_a_gpu_and_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="megablocks runs Triton kernels, which need a GPU.*use auto"):
        check_kernels("megablocks", n_gpus=0)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("megablocks", "stk") else 1
    )
    with pytest.raises(ConfigError, match="needs megablocks and stk, .*; make megablocks .* or use auto"):
        check_kernels("megablocks", n_gpus=1)
    monkeypatch.undo()
    check_kernels("torch_grouped", n_gpus=0)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="need a GPU"):
            check_machine(load_config("tiny", ["train.expert_backend=megablocks"]), 1)
