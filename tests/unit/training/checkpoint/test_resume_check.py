"""Which changes are free when a run is resumed, and which are refused by name."""

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from tests.checkpoints import build_engine, save_alone
from tests.layouts import groups_of
from tests.runs import run_config
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import Corpus
from turnout.launch.ranks.attempt import is_finished, resume_run
from turnout.launch.run_dir import attachments, create_run_dir, has_run, read_config
from turnout.launch.settings import check_setting_paths, setting_paths
from turnout.training.checkpoint.directory import checkpoint_path, read_checkpoint
from turnout.training.checkpoint.manifest import DataIdentity, rank_file
from turnout.training.checkpoint.resume_check import check_same_data, check_same_run
from turnout.training.config.run import RunConfig
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.parallel.layout import Layout

FREE = {
    *(
        "parallel.tp",
        "parallel.ep",
        "parallel.sequence_parallel",
        "parallel.ep_max_load",
        "parallel.ep_chunks",
        "parallel.zero_stage",
        "parallel.timeout_s",
    ),
    *(
        "train.microbatch_seqs",
        "train.recompute",
        "train.compile",
        "train.expert_backend",
        "data.corpus",
        "data.verify",
    ),
    *("eval.every_steps", "eval.max_documents", "log.every_steps", "log.trackers"),
    *(
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.keep_every_steps",
        "checkpoint.async_save",
    ),
    *("sample.prompts", "sample.n_tokens", "sample.temperature", "sample.top_p"),
    *("guard.on_non_finite", "guard.on_spike", "guard.spike_sigma", "guard.spike_window_steps"),
    *("guard.on_collapse", "guard.max_load_frac", "guard.max_dead_frac", "guard.collapse_patience_steps"),
    *("guard.skip_window_steps", "guard.max_interventions"),
}
FIXED = {
    *("model.n_layers", "model.d_model", "model.n_heads", "model.n_kv_heads", "model.d_head"),
    "model.d_expert",
    *("model.n_experts", "model.top_k", "model.n_shared_experts", "model.n_dense_layers", "model.d_ff"),
    *("model.vocab_size", "model.seq_len", "model.rope_theta", "model.norm_eps", "model.init_std"),
    *("model.qk_norm", "model.sliding_window", "model.tie_embeddings", "model.router.score"),
    *("model.router.normalize", "model.router.scale", "model.router.n_groups", "model.router.top_groups"),
    *("model.router.capacity_factor", "model.balance.coef", "model.balance.scope", "model.balance.z_coef"),
    *("model.balance.bias_rate", "train.n_steps", "train.batch_tokens", "train.precision", "train.seed"),
    *("train.clip_norm", "optim.lr", "optim.betas", "optim.eps", "optim.weight_decay", "optim.schedule.kind"),
    *("optim.schedule.warmup_steps", "optim.schedule.final_frac", "optim.schedule.decay_frac", "data.seed"),
    "data.attend_across_documents",
}  # fmt: skip
SAVED = run_config()
TEXT = DataIdentity(corpus_hash="a" * 64, tokenizer_sha256="b" * 64)


def changed(node: Any, path: str) -> Any:
    """Return a config with another value at a path, of its type, whether or not the whole is valid."""
    name, _, rest = path.partition(".")
    value = getattr(node, name)
    if rest:
        return node.model_copy(update={name: changed(value, rest)})
    return node.model_copy(update={name: another(value, type(node).model_fields[name].annotation)})


def another(value: Any, annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[:1] if value else ("x",)
    if isinstance(value, str):
        return value + "x"
    return 1 if value is None else value + 1


def test_every_setting_is_either_free_to_change_or_not() -> None:
    assert not FREE & FIXED
    assert set(setting_paths()) == FREE | FIXED


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", sorted(FREE))
def test_a_free_change_is_silent(path: str) -> None:
    assert check_same_run(SAVED, changed(SAVED, path), ()) == []


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the changed config may be invalid
@pytest.mark.parametrize("path", sorted(FIXED))
def test_another_change_is_refused_by_name_unless_allowed(path: str) -> None:
    wanted = changed(SAVED, path)
    others = FIXED - {path}
    with pytest.raises(ConfigError) as caught:
        check_same_run(SAVED, wanted, others)
    message = str(caught.value)
    assert message.endswith(f"; change them back, or allow the change: --allow-change {path}"), message
    assert [other for other in others if f" {other} " in message] == []
    (change,) = check_same_run(SAVED, wanted, [path])
    assert change.startswith(f"{path} ") and " -> " in change and change in message


def test_only_what_was_allowed_goes_through() -> None:
    wanted = run_config(optim={"lr": 0.01, "weight_decay": 0.2, "schedule": {"warmup_steps": 3}})
    with pytest.raises(ConfigError, match=r"other settings: optim.weight_decay 0\.1 -> 0\.2; ") as caught:
        check_same_run(SAVED, wanted, ["optim.lr"])
    assert "optim.lr" not in str(caught.value)
    changes = check_same_run(SAVED, wanted, ["optim.lr", "optim.weight_decay"])
    assert changes == ["optim.lr 0.05 -> 0.01", "optim.weight_decay 0.1 -> 0.2"]
    with pytest.raises(ConfigError, match="--allow-change optim.lr --allow-change optim.weight_decay$"):
        check_same_run(SAVED, wanted, [])


def test_allowing_what_did_not_change_is_silent() -> None:
    """The second attempt of a job with --allow-change finds the change in the first one's checkpoint."""
    assert check_same_run(SAVED, SAVED, ["optim.lr"]) == []
    assert check_same_data(TEXT, TEXT, ["data.corpus"]) == []


def test_a_change_of_the_number_of_steps_states_its_effect_on_the_learning_rate() -> None:
    (change,) = check_same_run(SAVED, changed(SAVED, "train.n_steps"), ["train.n_steps"])
    assert change == (
        "train.n_steps 20 -> 21 (the learning rate continues on the schedule for the new number of steps)"
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("optim.lrr", "no such setting; did you mean optim.lr?"),
        ("lr", "no such setting; did you mean optim.lr?"),
        ("train.batch_token", "did you mean train.batch_tokens?"),
        ("optim.schedule", "it is a section, with optim.schedule.kind, optim.schedule.warmup_steps, "),
        ("", "no such setting; there are checkpoint, data, "),
    ],
)
def test_for_an_unknown_setting_the_nearest_is_suggested(path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_setting_paths("--allow-change", ["optim.lr", path])
    assert f"--allow-change {path}: " in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("field", ["corpus_hash", "tokenizer_sha256"])
def test_other_text_is_refused_unless_allowed(field: str) -> None:
    found = TEXT.model_copy(update={field: "\x1b[2J" + "e" * 60})
    change = rf"data.corpus {field} {getattr(TEXT, field)[:12]} -> \x1b[2Jeeeeeeee"
    with pytest.raises(ConfigError) as caught:
        check_same_data(TEXT, found, ["data.seed", "data.verify"])
    assert str(caught.value) == (
        f"the run has other text: {change}; use the old corpus, or allow the change: "
        "--allow-change data.corpus"
    )
    assert check_same_data(TEXT, found, ["data.corpus"]) == [change]


def test_a_loss_scale_is_ignored_where_none_is_needed(one_rank: None) -> None:
    """As when an fp32 run is resumed from an fp16 checkpoint."""
    engine = build_engine(SAVED, groups_of(Layout(1), 0))
    before = dict(vars(engine._engine.optimizer.loss_scaler))
    engine.restore_loss_scaler({"cur_scale": 65536.0, "cur_iter": 3.0})
    assert dict(vars(engine._engine.optimizer.loss_scaler)) == before and before["cur_scale"] == 1
    with pytest.raises(CheckpointError, match=r"unknown fields \['__class__'\]"):
        engine.restore_loss_scaler({"__class__": 1.0})
    engine.close()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """Two corpora of different text, with the same tokenizer."""
    place = tmp_path_factory.mktemp("corpora")
    made = []
    for seed in (0, 1):
        (place / str(seed)).mkdir()
        made.append(make_corpus(place / str(seed), {"text": make_texts(40, seed=seed)}, valid_frac=0.2))
    return made[0], made[1]


def config_on(corpus: Corpus, lr: float = 0.001) -> RunConfig:
    return run_config(data={"corpus": str(corpus.path)}, optim={"lr": lr})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Run:
    """A run directory, with methods to save and to resume the run."""

    def __init__(self, path: Path, corpus: Corpus) -> None:
        self.path, self.corpus = path, corpus
        create_run_dir(path, config_on(corpus), corpus, nproc=1)

    def save(self, *steps: int) -> None:
        save_alone(self.path, steps, attached=attachments(self.path, read_config(self.path)))

    def resume_run(self, *allowed: str, corpus: Corpus | None = None, **optim: float) -> int:
        corpus = corpus or self.corpus
        cfg = config_on(corpus, **optim)
        newest = resume_run(self.path, cfg, corpus, nproc=1, allowed_changes=allowed)
        return newest[1].state.step if newest is not None else 0


@pytest.fixture
def run(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> Run:
    return Run(tmp_path / "run", corpora[0])


def test_a_run_is_resumed_from_its_newest_readable_checkpoint(run: Run) -> None:
    assert run.resume_run() == 0
    run.save(3, 5)
    assert run.resume_run() == 5
    (checkpoint_path(run.path, 5) / rank_file(0)).unlink()
    assert run.resume_run() == 3
    (checkpoint_path(run.path, 3) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint: .*step-00000005.*step-00000003"):
        run.resume_run()


def test_a_refused_change_leaves_the_run_as_it_was(run: Run, corpora: tuple[Corpus, Corpus]) -> None:
    for n_saved in (0, 1):
        before = contents(run.path)
        with pytest.raises(ConfigError, match="--allow-change optim.lr$"):
            run.resume_run(lr=0.01)
        with pytest.raises(ConfigError, match="--allow-change data.corpus$"):
            run.resume_run("optim.lr", corpus=corpora[1])
        assert contents(run.path) == before, f"{n_saved} checkpoints"
        run.save(3)


def test_an_allowed_change_is_printed_and_stored(
    run: Run, corpora: tuple[Corpus, Corpus], capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(3)
    capsys.readouterr()
    assert run.resume_run("optim.lr", "data.corpus", corpus=corpora[1], lr=0.01) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "changed, as allowed: optim.lr 0.001 -> 0.01"
    assert lines[1].startswith("changed, as allowed: data.corpus corpus_hash ") and len(lines) == 2
    assert read_config(run.path) == config_on(corpora[1], lr=0.01)


def test_settings_are_compared_with_those_of_the_checkpoint(run: Run) -> None:
    """An attempt with an allowed change may end before it saves; then it is still a change."""
    run.save(3)
    run.resume_run("optim.lr", lr=0.01)
    with pytest.raises(ConfigError, match=r"optim.lr 0.001 -> 0.01;"):
        run.resume_run(lr=0.01)
    assert run.resume_run() == 3


def test_text_that_was_allowed_once_need_not_be_allowed_again(
    run: Run, corpora: tuple[Corpus, Corpus]
) -> None:
    """Even before a checkpoint records it: text is compared with that of the newest attempt."""
    run.resume_run("data.corpus", corpus=corpora[1])
    assert run.resume_run(corpus=corpora[1]) == 0
    run.save(5)
    assert run.resume_run(corpus=corpora[1]) == 5
    with pytest.raises(ConfigError, match="--allow-change data.corpus$"):
        run.resume_run()


def test_each_attempt_is_added_to_the_provenance(run: Run, corpora: tuple[Corpus, Corpus]) -> None:
    run.resume_run("data.corpus", corpus=corpora[1])
    run.resume_run("data.corpus")
    attempts = json.loads((run.path / "provenance.json").read_bytes())["attempts"]
    want = [corpora[i].manifest.corpus_hash for i in (0, 1, 0)]
    assert [attempt["corpus_hash"] for attempt in attempts] == want and want[0] != want[1]


def test_a_run_is_finished_by_an_intact_checkpoint_of_its_last_step(run: Run) -> None:
    cfg = config_on(run.corpus)
    assert cfg.train.n_steps == 20
    run.save(19, 20, 21)
    finished = {}
    for step in (19, 20, 21):
        path = checkpoint_path(run.path, step)
        finished[step] = is_finished(path, read_checkpoint(path), cfg)
    assert finished == {19: False, 20: True, 21: True}
    path = checkpoint_path(run.path, 20)
    content = bytearray((path / rank_file(0)).read_bytes())
    content[-1] ^= 1
    (path / rank_file(0)).write_bytes(content)
    assert not is_finished(path, read_checkpoint(path), cfg), "its sizes are right, its bytes are not"


def test_a_run_directory_without_a_config_is_made_again(tmp_path: Path, run: Run) -> None:
    half = tmp_path / "half"
    (half / "logs").mkdir(parents=True)
    assert not has_run(half)
    (half / "provenance.json").write_bytes((run.path / "provenance.json").read_bytes())
    (half / "config.toml.tmp").write_bytes(b"[mod")
    assert not has_run(half)
    create_run_dir(half, config_on(run.corpus), run.corpus, nproc=1)
    assert has_run(half)
    (half / "config.toml").unlink()
    (half / "logs" / "mine.log").touch()
    with pytest.raises(ConfigError, match="is not empty, but holds no run to resume"):
        has_run(half)
