"""turnout as users install it, from a wheel or editable, beside packages of theirs that have our names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THEIRS = ("data", "training", "launch", "moe")
# Prints where each module lies, and whether the files that are no modules were installed.
ASK = """
import json
import turnout, data, training, launch, moe
import turnout.data.files, turnout.training.errors, turnout.moe.config
from turnout.launch.settings import recipe_names
from turnout.launch.slurm.batch_script import TEMPLATES
ours = [turnout, turnout.data.files, turnout.training.errors, turnout.moe.config]
theirs = [data, training, launch, moe]
files = [[module.__file__ for module in modules] for modules in (ours, theirs)]
print(json.dumps([*files, recipe_names(), (TEMPLATES / "job.sh").is_file()]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files with their links, so that no build writes into the tree itself."""
    copy = tmp_path_factory.mktemp("clone") / "turnout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project that has packages called as our folders are."""
    project = tmp_path_factory.mktemp("theirs")
    for name in THEIRS:
        (project / name).mkdir()
        (project / name / "__init__.py").write_text("")
    return project


def make_environment(directory: Path) -> Path:
    """Make an environment with what turnout depends on but without turnout; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    paths = {"base": str(directory), "platbase": str(directory)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    # Not as a directory of packages of its own: a link to turnout in it would be followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return directory / "bin" / "python"


def pip_install(python: Path, *arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "--disable-pip-version-check", "--no-build-isolation", *arguments], check=True)


def run(cwd: Path, *command: str | Path, code: int = 0) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_each_imports_its_own_packages(kind: str, tree: Path, theirs: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    pip_install(python, *(["--editable"] if kind == "editable" else []), str(tree))
    home = tree if kind == "editable" else tmp_path / "env"
    ours, users, recipes, has_script = json.loads(run(theirs, python, "-c", ASK))
    assert all(Path(file).is_relative_to(home) for file in ours), ours
    assert users == [str(theirs / name / "__init__.py") for name in THEIRS]
    assert "tiny" in recipes and has_script
    for turnout in ((python, "-m", "turnout"), (python.parent / "turnout",)):
        assert run(theirs, *turnout, "--version").strip() == version_of(tree)
        refusal = run(theirs, *turnout, "train", "tiny", "--set", "train.nsteps=3", code=2)
        assert "did you mean train.n_steps?" in refusal


def test_a_tree_that_is_not_installed_runs(tree: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    assert run(tree, python, "-m", "turnout", "--version").strip() == version_of(tree)


def version_of(tree: Path) -> str:
    scope: dict[str, str] = {}
    exec((tree / "turnout" / "__init__.py").read_text(), scope)
    return scope["__version__"]
