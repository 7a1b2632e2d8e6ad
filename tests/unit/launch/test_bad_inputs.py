"""Mistakes a user can make on the command line: one clear line, the right exit code, nothing half-written."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.checkpoints import save_alone
from tests.unit.data_fixtures import make_corpus, make_texts, write_tokenizer
from turnout.data.corpus import open_corpus
from turnout.launch.cli.main import main
from turnout.launch.run_dir import attachments, create_run_dir
from turnout.launch.settings import load_config

MODEL = """
[model]
n_layers = 2
d_model = 16
n_heads = 2
n_kv_heads = 1
d_head = 8
d_expert = 8
n_experts = 4
top_k = 2
vocab_size = 300
seq_len = 16

[train]
n_steps = 4
batch_tokens = 64
microbatch_seqs = 2

[optim]
lr = 1e-3

[sample]
n_tokens = 4

[data]
corpus = "corpus"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good recipe and a good corpus."""
    make_corpus(tmp_path, {"text": make_texts(60)}, valid_frac=0.2)
    (tmp_path / "run.toml").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0), capsys.readouterr().err


def check_refusal(result: tuple[int, str], code: int, words: str) -> None:
    got, message = result
    assert got == code, message
    assert words in message
    assert len(message.splitlines()) == 1 and message.startswith("turnout: "), message


def train_with(*overrides: str) -> list[str]:
    return ["train", "run.toml", "--run-dir", "run", *(x for o in overrides for x in ("--set", o))]


def truncate_shard(place: Path) -> None:
    path = next((place / "corpus" / "train").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_byte(place: Path) -> None:
    path = next((place / "corpus" / "train").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[11] ^= 1
    path.write_bytes(content)


def swap_tokenizer(place: Path) -> None:
    # Another vocab_size, so that the bytes differ.
    other = place / "other"
    other.mkdir()
    (place / "corpus" / "tokenizer.model").write_bytes(write_tokenizer(other, vocab_size=301).read_bytes())


def delete_manifest(place: Path) -> None:
    (place / "corpus" / "corpus.json").unlink()


def use_run_directory(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text("{}\n")


def put_file_in_the_way(place: Path) -> None:
    (place / "run").write_text("")


def drop_validation(place: Path) -> None:
    manifest = json.loads((place / "corpus" / "corpus.json").read_text())
    for source in manifest["sources"]:
        source["splits"]["valid"] = {"shards": [], "n_documents": 0, "n_tokens": 0, "n_text_bytes": 0}
    (place / "corpus" / "corpus.json").write_text(json.dumps(manifest))


def nothing(place: Path) -> None:
    pass


def make_run(place: Path) -> None:
    """Create a run that has not saved a checkpoint yet."""
    cfg = load_config("run.toml")
    create_run_dir(place / "run", cfg, open_corpus(Path(cfg.data.corpus), verify="size"), nproc=1)


def make_run_on_other_text(place: Path) -> None:
    make_run(place)
    (place / "elsewhere").mkdir()
    make_corpus(place / "elsewhere", {"text": make_texts(60, seed=5)}, valid_frac=0.2)
    shutil.rmtree(place / "corpus")
    (place / "elsewhere" / "corpus").rename(place / "corpus")


def then(make: Callable[[Path], None], spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(place: Path) -> None:
        make(place)
        spoil(place)

    return both


def save_step_4(place: Path) -> None:
    make_run(place)
    save_alone(Path("run"), [4], attached=attachments(Path("run"), load_config("run.toml")))


def resume_with(*overrides: str, allow: Sequence[str] = ()) -> list[str]:
    return [*train_with(*overrides), "--resume", *(x for path in allow for x in ("--allow-change", path))]


CHECKPOINT = "run/checkpoints/step-00000004"

# name: (what is broken first, arguments, exit code, a part of the message)
TRAINING: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no such recipe": (nothing, ["train", "tinny", "--run-dir", "run"], 2, "did you mean tiny?"),
    "no such recipe file": (nothing, ["train", "gone.toml", "--run-dir", "run"], 2, "gone.toml: cannot be read"),
    "no run directory": (nothing, ["train", "run.toml"], 2, "--run-dir is required"),
    "no ranks": (nothing, [*train_with(), "--nproc", "0"], 2, "--nproc 0 must be at least 1"),
    "an unknown option": (nothing, [*train_with(), "--nprok", "2"], 2, "--nprok"),
    "an unknown command": (nothing, ["trane", "run.toml"], 2, "trane"),
    "a typo in a setting": (nothing, train_with("model.n_layer=3"), 2, "did you mean model.n_layers?"),
    "a wrong type": (nothing, train_with("train.n_steps=soon"), 2, "train.n_steps='soon'"),
    "a setting without value": (nothing, train_with("train.n_steps"), 2, "is not path=value"),
    "groups that limit nothing": (nothing, train_with("model.router.n_groups=2", "model.router.top_groups=2"), 2, "no effect"),
    "experts that groups do not divide": (nothing, train_with("model.router.n_groups=3"), 2, "use one of [1, 2, 4]"),
    "top_k above n_experts": (nothing, train_with("model.top_k=5"), 2, "top_k=5 is more than n_experts=4"),
    "top 1 renormalised": (nothing, train_with("model.top_k=1"), 2, "router.normalize=false"),
    "a batch that ranks do not divide": (nothing, [*train_with(), "--nproc", "3"], 2, "use one of [1, 2] ranks"),
    "a batch that is not whole sequences": (nothing, train_with("train.batch_tokens=70"), 2, "use 64 or 80"),
    "tensor parallelism beyond the key heads": (nothing, [*train_with("parallel.tp=2"), "--nproc", "2"], 2, "must divide model.n_kv_heads=1; use one of [1]"),
    "a vocabulary smaller than the tokenizer's": (nothing, train_with("model.vocab_size=100"), 2, "use model.vocab_size=320"),
    "a used run directory": (use_run_directory, train_with(), 2, "run is not empty"),
    "a file as run directory": (put_file_in_the_way, train_with(), 2, "run is a file"),
    "no such corpus": (nothing, train_with("data.corpus=gone"), 3, "gone: no such corpus directory"),
    "an interrupted corpus": (delete_manifest, train_with(), 3, "prepare was interrupted"),
    "a truncated shard": (truncate_shard, train_with(), 3, ".bin"),
    "a changed shard": (flip_a_byte, train_with(), 3, ".bin"),
    "another tokenizer": (swap_tokenizer, train_with(), 3, "tokenizer.model"),
    "sequences beyond the corpus": (nothing, train_with("model.seq_len=65536", "train.batch_tokens=65536", "train.microbatch_seqs=1"), 3, "fewer than one window"),
    "a corpus smaller than one batch": (nothing, train_with("train.batch_tokens=65536"), 3, "fewer than the 4096 sequences"),
    "keeping nothing": (nothing, train_with("checkpoint.keep_last=0"), 2, "checkpoint.keep_last=0: input should be greater than 0"),
    "never saving": (nothing, train_with("checkpoint.every_steps=0"), 2, "checkpoint.every_steps=0"),
    "keeping steps that are not saved": (nothing, train_with("checkpoint.every_steps=2", "checkpoint.keep_every_steps=3"), 2, "keep_every_steps=3 must be a multiple of every_steps=2; use 2 or 4"),
    "keeping without saving": (nothing, train_with("checkpoint.keep_every_steps=3"), 2, "keep_every_steps=3 has no effect without every_steps"),
    "a typo in checkpoint": (nothing, train_with("checkpoint.every_step=3"), 2, "did you mean checkpoint.every_steps?"),
    "an action that the guard does not have": (nothing, train_with("guard.on_spike=panic"), 2, "guard.on_spike='panic'"),
    "a spike's width without a guard against spikes": (nothing, train_with("guard.spike_sigma=3.0"), 2, "spike_sigma=3.0 has no effect with on_spike=off; set on_spike"),
    "a spike's width of zero": (nothing, train_with("guard.on_spike=stop", "guard.spike_sigma=0"), 2, "guard.spike_sigma=0"),
    "a spike's window longer than the run": (nothing, train_with("guard.on_spike=stop"), 2, "guard.spike_window_steps=100 must be below train.n_steps=4"),
    "a collapse without a limit": (nothing, train_with("guard.on_collapse=stop", "guard.collapse_patience_steps=2"), 2, "needs max_load_frac, max_dead_frac or both"),
    "a load limit that no routing can exceed": (nothing, train_with("guard.on_collapse=stop", "guard.collapse_patience_steps=2", "guard.max_load_frac=0.6"), 2, "guard.max_load_frac=0.6 must be at least 0.25"),
    "a limit on dead experts that no routing can exceed": (nothing, train_with("guard.on_collapse=stop", "guard.collapse_patience_steps=2", "guard.max_dead_frac=0.5"), 2, "guard.max_dead_frac=0.5 must be below 0.5"),
    "a patience longer than the run": (nothing, train_with("guard.on_collapse=stop", "guard.max_dead_frac=0.1"), 2, "guard.collapse_patience_steps=50 must not be above train.n_steps=4"),
    "a skipped collapse": (nothing, train_with("guard.on_collapse=skip"), 2, "guard.on_collapse='skip'"),
    "a rollback without a checkpoint": (nothing, train_with("guard.on_non_finite=rollback"), 2, "guard.on_non_finite=rollback needs a checkpoint before the last step"),
    "skipped data without a rollback": (nothing, train_with("guard.skip_window_steps=2"), 2, "skip_window_steps=2 has no effect without a rollback"),
    "a limit on interventions that never happen": (nothing, train_with("guard.max_interventions=2"), 2, "max_interventions=2 has no effect when nothing is skipped"),
    "an allowed change without --resume": (nothing, [*train_with(), "--allow-change", "optim.lr"], 2, "--allow-change optim.lr has no effect without --resume"),
    "an allowed change of an unknown setting": (make_run, resume_with(allow=["optim.lrr"]), 2, "--allow-change optim.lrr: no such setting; did you mean optim.lr?"),
    "an allowed change of a section": (make_run, resume_with(allow=["optim"]), 2, "--allow-change optim: no such setting; it is a section, with optim.lr, "),
    "a changed setting": (make_run, resume_with("optim.lr=0.5"), 2, "optim.lr 0.001 -> 0.5; change them back, or allow the change: --allow-change optim.lr"),
    "a change besides the allowed one": (make_run, resume_with("optim.lr=0.5", "train.seed=7", allow=["optim.lr"]), 2, "other settings: train.seed 0 -> 7; "),
    "other text": (make_run_on_other_text, resume_with(), 2, "the run has other text: data.corpus corpus_hash "),
    "resuming a directory without a run": (use_run_directory, resume_with(), 2, "run is not empty, but holds no run to resume"),
    "resuming a file": (put_file_in_the_way, resume_with(), 2, "run is a file"),
    "resuming without a directory": (nothing, ["train", "run.toml", "--resume"], 2, "--run-dir is required"),
    "resuming without provenance": (then(save_step_4, lambda place: (place / "run" / "provenance.json").unlink()), resume_with(), 2, "copy the whole run"),
    "resuming with a broken provenance": (then(make_run, lambda place: (place / "run" / "provenance.json").write_text("{}")), resume_with(), 2, "provenance.json: damaged"),
    "resuming with a broken config": (then(make_run, lambda place: (place / "run" / "config.toml").write_text("[model")), resume_with(), 2, "config.toml: cannot be read"),
    "resuming without an intact checkpoint": (then(save_step_4, lambda place: (place / CHECKPOINT / "manifest.json").unlink()), resume_with(), 4, f"no intact checkpoint: {CHECKPOINT}/manifest.json: is missing"),
    "no held-out text": (drop_validation, train_with(), 3, "validation split is empty"),
}  # fmt: skip


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "an unknown command": (nothing, ["remove", "run"], 2, "remove"),
    "no directory": (nothing, ["list"], 2, "--help"),
    "an unknown option": (save_step_4, ["show", "run", "--tensor"], 2, "--tensor"),
    "no such run": (nothing, ["list", "gone"], 2, "gone is not a run directory; name the directory given to --run-dir"),
    "no run to verify": (nothing, ["verify", "corpus"], 2, "corpus is not a run directory"),
    "a file": (nothing, ["show", "run.toml"], 2, "run.toml is not a run directory"),
    "a checkpoint in place of a run": (save_step_4, ["list", CHECKPOINT], 2, "name the run that has this checkpoint, run"),
    "the directory of checkpoints in place of a run": (save_step_4, ["verify", "run/checkpoints"], 2, "name the directory above it, run"),
    "pruning a checkpoint": (save_step_4, ["prune", CHECKPOINT, "--keep-last", "1"], 2, "name the run that has this checkpoint, run"),
    "pruning all": (save_step_4, ["prune", "run", "--keep-last", "0"], 2, "--keep-last 0 must be at least 1"),
    "pruning without a limit": (save_step_4, ["prune", "run"], 2, "--keep-last"),
    "pruning by a limit that is not a number": (save_step_4, ["prune", "run", "--keep-last", "some"], 2, "--keep-last"),
    "keeping every 0 steps": (save_step_4, ["prune", "run", "--keep-last", "1", "--keep-every-steps", "0"], 2, "--keep-every-steps 0 must be at least 1"),
    "no such checkpoint": (save_step_4, ["verify", "run/checkpoints/step-00000005"], 4, "step-00000005: no such checkpoint"),
    "nothing to show": (make_run, ["show", "run"], 4, "run has no checkpoint yet"),
    "a renamed checkpoint": (then(save_step_4, lambda place: (place / CHECKPOINT).rename(place / "mine")), ["show", "mine"], 4, "mine: not a checkpoint; a checkpoint has a name such as step-00001000"),
    "a checkpoint with another's name": (then(save_step_4, lambda place: (place / CHECKPOINT).rename(place / "step-00000009")), ["show", "step-00000009"], 4, "step-00000009: holds step 4; it was renamed"),
    "a missing file": (then(save_step_4, lambda place: (place / CHECKPOINT / "router.safetensors").unlink()), ["verify", CHECKPOINT], 4, f"{CHECKPOINT}/router.safetensors: is missing"),
}  # fmt: skip


COMMANDS = TRAINING | {
    f"checkpoint: {name}": (damage, ["checkpoint", *arguments], code, words)
    for name, (damage, arguments, code, words) in CHECKPOINTS.items()
}


@pytest.mark.parametrize(("damage", "arguments", "code", "words"), COMMANDS.values(), ids=COMMANDS.keys())
def test_command_refuses_and_writes_nothing(
    damage: Callable[[Path], None],
    arguments: list[str],
    code: int,
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(place)
    before = sorted(place.rglob("*"))
    check_refusal(run(*arguments, capsys=capsys), code, words)
    assert sorted(place.rglob("*")) == before


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(content) and None


PREPARING: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no input": (nothing, [], 2, "name some input"),
    "a missing file": (nothing, ["gone.txt"], 3, "gone.txt"),
    "an empty file": (write("empty.txt", b""), ["empty.txt"], 3, "empty.txt"),
    "invalid UTF-8": (write("bad.txt", b"good\xff\xfe"), ["bad.txt"], 3, "bad.txt"),
    "an unknown kind of file": (write("x.pdf", b"%PDF"), ["x.pdf"], 3, "x.pdf"),
    "broken JSON": (write("bad.jsonl", b'{"text": "a"}\n{"te\n'), ["bad.jsonl"], 3, "bad.jsonl:2"),
    "a missing field": (write("f.jsonl", b'{"body": "a"}\n'), ["f.jsonl"], 3, "body"),
    "a null text": (write("n.jsonl", b'{"text": null}\n'), ["n.jsonl"], 3, "n.jsonl:1"),
    "a vocabulary too large for the text": (write("s.txt", b"a short text\n"), ["s.txt"], 3, "vocab_size=32768"),
    "a file that is not a tokenizer": (write("t.model", b"junk"), ["text.jsonl", "--tokenizer", "t.model"], 3, "t.model"),
    "all text held out": (nothing, ["text.jsonl", "--valid-frac", "1"], 2, "--valid-frac 1.0"),
    "a weight without its source": (nothing, ["text.jsonl", "--weight", "web=1"], 2, "'web'"),
    "a weight that is not a number": (nothing, ["text.jsonl", "--weight", "text=big"], 2, "NAME=NUMBER"),
    "a negative weight": (nothing, ["text.jsonl", "--weight", "text=-1"], 2, "must be positive"),
    "a weight given twice": (nothing, ["text.jsonl", "--weight", "text=1", "--weight", "text=2"], 2, "given twice"),
    "a vocabulary of size zero": (nothing, ["text.jsonl", "--vocab-size", "0"], 2, "--vocab-size 0 must be positive"),
    "a text field for the embedded corpus": (nothing, ["--embedded", "--text-field", "body"], 2, "--text-field"),
    "another corpus's directory": (nothing, ["text.jsonl", "--vocab-size", "300", "--out", "corpus"], 3, "corpus"),
    "a directory that is not ours": (write("run", b""), ["text.jsonl", "--out", "."], 3, "give an empty or new directory"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "arguments", "code", "words"), PREPARING.values(), ids=PREPARING.keys())
def test_preparing_refuses(
    damage: Callable[[Path], None],
    arguments: list[str],
    code: int,
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(place)
    out = [] if "--out" in arguments else ["--out", "new"]
    check_refusal(run("prepare", *arguments, *out, "--workers", "1", capsys=capsys), code, words)
    assert not (place / "new" / "corpus.json").exists()
    assert not list(place.rglob("*.tmp"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_kernels_are_refused_before_ranks_start(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = run(*train_with("train.expert_backend=megablocks"), capsys=capsys)
    assert code == 2 and "need a GPU" in message and not (place / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = run(*train_with('log.trackers=["wandb"]'), capsys=capsys)
    assert code == 2 and "pip install 'turnout[wandb]'" in message


COMMANDS = [
    "prepare",
    "train",
    "doctor",
    *(f"checkpoint {name}" for name in ("list", "verify", "show", "prune")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert not caught.value.code
    assert f"Example: turnout {command} " in capsys.readouterr().out
