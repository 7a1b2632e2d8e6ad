"""Rules of the house that would otherwise be wishes: import direction, sizes, and where the cluster may be
known.
"""

import ast
import re
import subprocess
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.architecture.tree import PACKAGES, ROOT, imported_modules, module_of, name_of, sources

MAY_IMPORT = {
    "moe": {"moe"},
    "data": {"data"},
    "training": {"training", "moe", "data"},
    "launch": {"launch", "training", "moe", "data"},
}
KNOWS_DISTRIBUTED = (
    "moe/parallel/",
    "training/parallel/groups.py",
    "training/engine/engine.py",
    "training/checkpoint/saver.py",
    "launch/",
)
# The engine, and an expert backend whose kernels DeepSpeed ships.
KNOWS_DEEPSPEED = ("training/engine/engine.py", "moe/experts/triton_grouped.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 80  # 400 and 60 are wished
MAX_FOLDER_FILES = 20


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=name_of)
def test_ours_is_imported_by_its_full_name(path: Path) -> None:
    """From the root of the tree `import moe` works too, and makes a second copy of every module."""
    short = {module for module in imported_modules(path) if module.split(".")[0] in (*PACKAGES, "slurm")}
    assert not short, f"import turnout.{sorted(short)[0]}"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("turnout.")}
    ours &= {*PACKAGES}
    assert ours <= MAY_IMPORT[package], f"{package} may not import {sorted(ours - MAY_IMPORT[package])}"
    assert not any(name.split(".")[0] == "tests" for name in imported_modules(path))


def test_subpackages_import_one_another_one_way() -> None:
    """A node is a subpackage, or a file that is in none."""
    modules = {module_of(path) for path in sources(*PACKAGES)}
    imports = defaultdict(set)
    for path in sources(*PACKAGES):
        for name in {*imported_modules(path)} & modules:
            imports[node_of(module_of(path))].add(node_of(name))
    for node in list(imports):
        reached, to_visit = set(), imports[node] - {node}
        while to_visit:
            reached.add(one := to_visit.pop())
            to_visit |= imports[one] - reached - {one}
        assert node not in reached, f"{node} imports, by way of others, what imports it"


def node_of(module: str) -> str:
    """Return turnout.training.checkpoint for what is in it, and turnout.training.loop as it is."""
    return ".".join(module.split(".")[:3])


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_the_cluster_is_known_in_few_files(path: Path) -> None:
    name, modules = name_of(path), set(imported_modules(path))
    text = path.read_text(encoding="utf-8")
    if not name.startswith(KNOWS_DISTRIBUTED):
        assert not any(module.startswith("torch.distributed") for module in modules)
        assert "torch.distributed." not in text
    if name not in KNOWS_DEEPSPEED:
        assert not any(module.split(".")[0] == "deepspeed" for module in modules)


def test_folders_stay_small() -> None:
    counts = Counter(
        name_of(path.parent) for path in sources(*PACKAGES, "tests") if path.name != "__init__.py"
    )
    large = {folder: n for folder, n in counts.items() if n > MAX_FOLDER_FILES}
    assert not large, f"more than {MAX_FOLDER_FILES} files: {large}"


def test_packages_are_listed_for_an_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {module_of(path) for path in sources(*PACKAGES, "slurm") if path.name == "__init__.py"}
    assert {*project["tool"]["setuptools"]["packages"]} == found | {"turnout"}
    for package in (*PACKAGES, "slurm"):
        assert (ROOT / "turnout" / package).readlink() == Path("..", package)


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


# What runs before or beside the ranks, on every node and at every command, where torch would take a second.
FREE_OF_TORCH = (
    "turnout.launch.cli.main",
    "turnout.launch.commands.status",
    "turnout.launch.ranks.deepspeed_launcher",
    "turnout.launch.ranks.launcher",
    "turnout.launch.slurm.node",
    "turnout.launch.slurm.node_check",
)
HEAVY = {"torch", "accelerate", "datasets", "deepspeed", "transformers"}


@pytest.mark.parametrize("module", FREE_OF_TORCH)
def test_launchers_and_checks_import_nothing_heavy(module: str) -> None:
    files = {module_of(path): path for path in sources(*PACKAGES)}
    came_from, to_visit = {module: ""}, [module]
    while to_visit:
        here = to_visit.pop()
        for name in imported_when_loaded(files[here]):
            assert name.split(".")[0] not in HEAVY, (
                f"{here} imports {name}; {here} came from {came_from[here]}"
            )
            if name in files and name not in came_from:
                came_from[name] = here
                to_visit.append(name)


def imported_when_loaded(path: Path) -> set[str]:
    """Return the modules that a file imports as it is loaded: not in functions, nor for annotations."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names
