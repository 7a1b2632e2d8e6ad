"""What a public function's docstring owes its reader: shapes of tensors, and the errors that it raises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.tree import PACKAGES, name_of, sources

Function = ast.FunctionDef | ast.AsyncFunctionDef
SUFFIX = re.compile(r"_[A-Z]{1,5}$")
SHAPE = re.compile(r"\[[^\]]*\]|\bshapes?\b|\bscalars?\b|\belements?\b")


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Yield functions, and the methods of classes, whose names have no underscore before them."""
    for node in tree.body:
        holders = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for holder in holders:
            if isinstance(holder, Function) and not holder.name.startswith("_"):
                yield holder


def tensors_of(function: Function) -> list[str]:
    """Return the names of arguments that are tensors, and "the result" where it is one."""
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    found = [one.arg for one in arguments if one.annotation and is_tensor(one.annotation)]
    return [*found, *(["the result"] if function.returns and is_tensor(function.returns) else [])]


def is_tensor(annotation: ast.expr) -> bool:
    return re.search(r"\bTensor\b", ast.unparse(annotation)) is not None


def raised_by(function: Function) -> set[str]:
    """Return the errors that a function raises itself, not those of what it calls or defines."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            names.add(ast.unparse(node.exc.func).split(".")[-1])
        nodes.extend(ast.iter_child_nodes(node))
    return {name for name in names if name[0].isupper()}


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_shapes_of_tensors_are_given(path: Path) -> None:
    missing = []
    for function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        tensors = tensors_of(function)
        has_suffixes = any(SUFFIX.search(name) for name in tensors)
        if tensors and not has_suffixes and not SHAPE.search(ast.get_docstring(function) or ""):
            missing.append(
                f"{name_of(path)}:{function.lineno}: {function.name} has tensors ({', '.join(tensors)})"
            )
    assert not missing, "no suffix and no shape in the docstring:\n" + "\n".join(missing)


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_errors_are_named(path: Path) -> None:
    if name_of(path.parent) == "launch/cli":
        return  # a command's docstring is what --help prints
    missing = []
    for function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(function) or ""
        for error in sorted(raised_by(function)):
            if not re.search(rf"\braises?\b[^.]*\b{error}\b", " ".join(text.split()), re.IGNORECASE):
                missing.append(f"{name_of(path)}:{function.lineno}: {function.name} raises {error}")
    assert not missing, "the docstring does not say so:\n" + "\n".join(missing)


def test_a_silent_docstring_is_found() -> None:
    source = "def f(x: Tensor) -> None:\n    'Add.'\n    raise ValueError('no')\n"
    (function,) = public_functions(ast.parse(source))
    assert tensors_of(function) == ["x"] and raised_by(function) == {"ValueError"}
