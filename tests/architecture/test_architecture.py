"""Rules of the house that would otherwise be wishes: import direction, sizes, and where the cluster may be
known.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("moe", "data", "training", "launch")
MAY_IMPORT = {
    "moe": {"moe"},
    "data": {"data"},
    "training": {"training", "moe", "data"},
    "launch": {"launch", "training", "moe", "data"},
}
KNOWS_DISTRIBUTED = {
    "moe/dispatch.py",
    "moe/tensor_parallel.py",
    "training/parallel.py",
    "training/engine.py",
    "training/checkpoint.py",
}
# The engine, and an expert backend whose kernels DeepSpeed ships.
KNOWS_DEEPSPEED = {"training/engine.py", "moe/triton_grouped.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 80  # 400 and 60 are wished


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imported_modules(path)} & {*PACKAGES, "tests"}
    assert ours <= MAY_IMPORT[package], f"{package} may not import {sorted(ours - MAY_IMPORT[package])}"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_the_cluster_is_known_in_few_files(path: Path) -> None:
    name, modules = name_of(path), set(imported_modules(path))
    text = path.read_text(encoding="utf-8")
    if name not in KNOWS_DISTRIBUTED and not name.startswith("launch/"):
        assert not any(module.startswith("torch.distributed") for module in modules)
        assert "torch.distributed." not in text
    if name not in KNOWS_DEEPSPEED:
        assert not any(module.split(".")[0] == "deepspeed" for module in modules)


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert text.isascii(), "ASCII only"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert n_lines <= MAX_FUNCTION_LINES, f"{node.name} has {n_lines} lines"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_modules_say_what_lives_in_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py":
        assert not text.strip(), "a name has one address"
        return
    assert ast.get_docstring(ast.parse(text)), "a module starts with what lives here"


def test_dependencies_are_declared_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in wanted}
    assert {n.replace("-", "_") for n in names} <= {n.replace("-", "_") for n in pinned}


def test_nothing_generated_or_large_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        assert not name.startswith(("corpora/", "runs/", "build/", ".venv/")), name
        path = ROOT / name
        assert not path.exists() or path.stat().st_size <= 500_000, f"{name} is large"
