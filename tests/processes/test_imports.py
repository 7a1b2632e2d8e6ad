"""What a command imports: --help, errors in the usage and `status` must be quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import run_config
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.launch.ranks.attempt import claim
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.launcher import free_port
from turnout.launch.run_dir import create_run_dir
from turnout.training.parallel.layout import Layout

HEAVY = {
    "torch",
    "numpy",
    "deepspeed",
    "accelerate",
    "datasets",
    "transformers",
    "sentencepiece",
    "tokenizers",
}
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # how threads wait for each other
# Runs a command and prints which of HEAVY it has imported, and its exit code, as JSON on the last line.
ASK = """
import json, sys
from turnout.launch.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
print()
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""

# Runs the only rank of a run, and prints the modules that it has imported.
RANK = """
import json, sys
from pathlib import Path
from turnout.launch.ranks.rank import run_rank
run_rank(Path(sys.argv[1]), Path(sys.argv[2]), 0)
print()
print(json.dumps(sorted(sys.modules)))
"""

REFUSALS = {
    "a typo in a setting": (2, "train tiny --run-dir new --set train.nsteps=3"),
    "an option that does not exist": (2, "train tiny --run-dir new --steps 3"),
    "a recipe that does not exist": (2, "train trian --run-dir new"),
    "ranks that do not fit": (2, "train tiny --run-dir new --nproc 0"),
    "submit: a typo in a setting": (2, "submit tiny --run-dir new --nodes 1 --set train.nsteps=3"),
    "doctor: a typo in a setting": (2, "doctor tiny --set train.nsteps=3"),
    "import: a typo in a setting": (2, "import tiny --from x --run-dir new --set train.nsteps=3"),
    "generate: no such model": (2, "generate nowhere text"),
    "evaluate: no such model": (2, "evaluate nowhere text.txt"),
    "lm-eval: no such model": (2, "lm-eval nowhere --tasks own"),
    "experts: no such model": (2, "experts nowhere text"),
    "export: no such model": (2, "export --checkpoint nowhere --out new --format hf"),
    "status: no such run": (2, "status nowhere"),
    "checkpoint: no such run": (2, "checkpoint verify nowhere"),
}


def ask(place: Path, *arguments: str) -> tuple[int, set[str]]:
    """Return a command's exit code and the top-level modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], cwd=place, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize("command", ["", "train", "checkpoint list", "generate", "evaluate", "export"])
def test_help_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    code, modules = ask(tmp_path, *command.split(), "--help")
    assert code == 0 and modules & HEAVY == set()


@pytest.mark.parametrize(("code", "command"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_imports_nothing_heavy(code: int, command: str, tmp_path: Path) -> None:
    found, modules = ask(tmp_path, *command.split())
    assert (found, modules & HEAVY) == (code, set())


def test_a_corpus_is_refused_without_torch(tmp_path: Path) -> None:
    """numpy and the tokenizer are enough to read it; only ranks need torch."""
    corpus = make_corpus(tmp_path, {"text": make_texts(20)}, valid_frac=0.2)
    vocabulary = ("--set", "model.vocab_size=128", "--set", f"data.corpus={corpus.path}")
    code, modules = ask(tmp_path, "train", "tiny", "--run-dir", "new", *vocabulary)
    assert code == 2
    assert modules & HEAVY == {"numpy", "sentencepiece", "tokenizers"}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run directory that its rank can start from, beside its corpus."""
    corpus = make_corpus(tmp_path, {"text": make_texts(200)}, valid_frac=0.1)
    cfg = run_config(
        model={"vocab_size": 300},
        train={"n_steps": 2, "microbatch_seqs": 4},
        optim={"schedule": {"warmup_steps": 1}},
        data={"corpus": str(corpus.path)},
        eval={"max_documents": 1},
        sample={"prompts": ("the",), "n_tokens": 2},
    )
    create_run_dir(run_dir := tmp_path / "run", cfg, corpus, nproc=1)
    return run_dir


def test_a_rank_and_status_import_only_what_they_need(begun: Path, tmp_path: Path) -> None:
    """A rank does not import torch's compiler, which would take two seconds."""
    start = claim(begun, make_attempt_dir(begun / "logs"), Layout(1))
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(begun), str(start.attempt_dir)],
        env={**os.environ, **ranks},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "deepspeed", "tensorboard"} <= modules, "it did not train and log"
    assert modules & {"torch._dynamo", "torch._inductor", "datasets", "transformers"} == set()
    for arguments in (["status", "run"], ["checkpoint", "list", "run"]):
        code, modules = ask(tmp_path, *arguments)
        assert code == 0 and modules & HEAVY == set(), arguments


def test_layouts_need_no_torch() -> None:
    modules = "turnout.training.parallel.layout, turnout.launch.slurm.node"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_command_sets_how_threads_wait_before_torch_is_loaded() -> None:
    asked = (
        "import atexit, os, sys\n"
        "from turnout.launch.cli.main import main\n"
        "atexit.register(lambda: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules))\n"
        "main(['--version'])\n"
    )
    unset = {name: value for name, value in os.environ.items() if name not in WAITING}
    for own, want in (({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        command, env = [sys.executable, "-c", asked], {**unset, **own}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert run.stdout.splitlines()[-1] == f"{want} False", run.stderr
