"""Every command of README.md, in its order, in one directory, as a reader would type them.

`make demo` and `make test` are not among them: .ci/run runs those.
"""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runs import read_rows
from turnout.launch.ranks.launcher import free_port
from turnout.launch.settings import load_config, recipe_names
from turnout.moe.flops import n_active_params, n_params

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]
# The first training runs as it stands. The others are cut to a few steps, after a check of their settings.
FEWER_STEPS = ["train.n_steps=10", "optim.schedule.warmup_steps=2", "sample.n_tokens=8"]
FEWER_STEPS += ["eval.max_documents=5"]
MAX_FILE_BYTES = 8_000  # of the reader's files
# What each command prints when it has succeeded.
SAYS = {
    "prepare": r"(?m)^corpus corpora/\w+: vocabulary \d+, hash [0-9a-f]{64}$",
    "train": r"(?m)^done in \d+m\d\ds: runs/\w+",
    "train --dry-run": r"(?m)^peak per rank +[\d.]+ GiB",
    "submit": r"(?m)^#SBATCH --nodes=2$",
    "status": r"(?m)^checkpoint +step 80, .*verified: every byte is as it was written$",
    "doctor": r"(?m)^all \d+ variants agree",
    "export": r"(?m)^exported to exports/",
    "import": r"(?m)^imported as runs/\w+; to train it: turnout train runs/\w+/config.toml",
    "generate": r"\S",
    "evaluate": r"(?m)total +\W +40 \W .*\d\.\d{4} \W*$",
    "lm-eval": r"own_text",
    "experts": r"layer|wrote",
    "checkpoint list": r"(?m)^80 .*readable$",
    "checkpoint show": r"(?m)^step +80$",
    "checkpoint verify": r"(?m)step-00000080: intact, ",
    "checkpoint prune": r"(?m)^\S+ MiB freed, 2 of \d checkpoints kept$",
}
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
ENV.pop("OMP_WAIT_POLICY", None)  # set for these tests; a reader's threads wait as the command says


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the reader's own files: docs/, src.jsonl.gz and tasks/ in README.md."""
    directory = tmp_path_factory.mktemp("reader")
    library = sorted(Path(json.__file__).parents[1].glob("*.py"))
    library = [source for source in library if 0 < source.stat().st_size < MAX_FILE_BYTES][:40]
    (directory / "docs").mkdir()
    for source in library[:20]:
        (directory / "docs" / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"))
    with gzip.open(directory / "src.jsonl.gz", "wt", encoding="utf-8") as file:
        for source in library[20:]:
            file.write(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n")
    (directory / "tasks").mkdir()
    (task,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (directory / "tasks" / "own_text.yaml").write_text(task)
    return directory


def test_readme_has_one_command_for_each_thing_a_user_does() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} == {"turnout", "tensorboard"}
    assert len(COMMANDS) == len(set(COMMANDS)) >= 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("turnout")])
def test_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands use the results of earlier ones, as they do for a reader."""
    words = shlex.split(command)
    if is_later_training(words) or words[1] == "import":
        monkeypatch.chdir(place)
        # The settings of README.md are checked as they stand; the run itself has fewer steps.
        load_config(words[2], [value for name, value in pairwise(words) if name == "--set"])
        words += [word for setting in FEWER_STEPS for word in ("--set", setting)]
    if "dense/" in words:
        write_dense(place / "dense", place / "corpora" / "stdlib" / "tokenizer.model")
    run = subprocess.run(words, cwd=place, env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert re.search(SAYS[kind_of(words)], run.stdout), run.stdout


def kind_of(words: list[str]) -> str:
    """Return a command's key in SAYS."""
    kinds = (f"{words[1]} {words[2]}", f"{words[1]} {words[-1]}", words[1])
    return next(kind for kind in kinds if kind in SAYS)


def write_dense(directory: Path, tokenizer: Path) -> None:
    """Write the reader's own dense model, which README.md calls dense/."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4096, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    (directory / tokenizer.name).write_bytes(tokenizer.read_bytes())


def is_later_training(words: list[str]) -> bool:
    return words[1] == "train" and "--run-dir" in words and "runs/first" not in words


def test_one_training_is_run_and_resumed_unchanged() -> None:
    trainings = [words for words in map(shlex.split, COMMANDS) if "train" in words and "--run-dir" in words]
    first, resumed = (words for words in trainings if not is_later_training(words))
    assert "--resume" in resumed and "--resume" not in first


def test_runs_left_what_readme_lists(place: Path) -> None:
    listed = re.findall(r"^(?:RUN/)?\s+([a-z.]+/?)  ", README, re.MULTILINE)
    assert len(listed) == 7
    for name in listed:
        assert (place / "runs" / "first" / name).exists(), name
    assert read_rows(place / "runs" / "first")[-1]["eval/bits_per_byte"] < 4


def test_tensorboard_serves_the_runs(place: Path) -> None:
    command = next(c for c in COMMANDS if c.startswith("tensorboard"))
    port = free_port()
    server = subprocess.Popen(
        [*shlex.split(command), "--port", str(port)], cwd=place, env=ENV, stderr=subprocess.DEVNULL
    )
    try:
        deadline_s, runs = time.monotonic() + 60, []
        while not runs and time.monotonic() < deadline_s:
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5) as answer:
                    runs = json.load(answer)
            except (urllib.error.URLError, ConnectionError):
                continue
    finally:
        server.terminate()
        server.wait(30)
    assert "first/tensorboard" in runs


def test_recipe_table_is_right() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) ([MB]) \| ([\d.]+) ([MB]) \|", README, re.MULTILINE)
    assert {row[0] for row in rows} == set(recipe_names())
    for name, total, total_unit, active, active_unit in rows:
        model, size = load_config(name).model, {"M": 1e6, "B": 1e9}
        assert n_params(model) == pytest.approx(float(total) * size[total_unit], rel=0.02), name
        assert n_active_params(model) == pytest.approx(float(active) * size[active_unit], rel=0.03), name
