"""A manifest with a false claim is refused in one line that names the field."""

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import SMALL_SHAPE
from tests.unit.hostile_fixtures import put_manifest, refusal
from turnout.launch.cli.main import main
from turnout.training.checkpoint.manifest import CONFIG_FILE, MANIFEST, MANIFEST_SUM, ROUTER_FILE, rank_file

RANK_FILE = rank_file(0)
NUMEL = prod(SMALL_SHAPE)
HUGE = 1 << 62
Tree = dict[str, Any]


def set_at(where: str, value: Any) -> Callable[[Tree], None]:
    """Set the value at a path of the manifest; its keys are separated by slashes."""

    def change(tree: Tree) -> None:
        *above, last = where.split("/")
        node: Any = tree
        for key in above:
            node = node[key]
        node[last] = value

    return change


def with_shards(*shards: list[Any]) -> Callable[[Tree], None]:
    return set_at("tensors/w/shards", [list(shard) for shard in shards])


def without(where: str) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        *above, last = where.split("/")
        node: Any = tree
        for key in above:
            node = node[key]
        del node[last]

    return change


def renamed(name: str) -> Callable[[Tree], None]:
    return lambda tree: tree["tensors"].update({name: tree["tensors"].pop("w")})


ALL = [0, 0, NUMEL, 0, NUMEL]
# name: (the lie, part of the error message)
LIES: dict[str, tuple[Callable[[Tree], None], str]] = {
    "a shape that is not its matrix": (set_at("tensors/w/shape", [5, 4]), "w: 1 x 24 is not its shape (5, 4)"),
    "a shape of huge sizes": (set_at("tensors/w/shape", [HUGE] * 8), "is not its shape"),
    "more sizes than a tensor has": (set_at("tensors/w/shape", [1] * 20), "tensors.w.shape"),
    "a size of zero": (set_at("tensors/w/shape", [0, 4]), "tensors.w.shape.0"),
    "a negative size": (set_at("tensors/w/n_rows", -1), "tensors.w.n_rows"),
    "a size beyond 64 bits": (set_at("tensors/w/row_width", 1 << 70), "tensors.w.row_width"),
    "a size that is a fraction": (set_at("tensors/w/row_width", 24.0), "tensors.w.row_width"),
    "a size that is a string": (set_at("tensors/w/row_width", "24"), "tensors.w.row_width"),
    "a size that is true": (set_at("tensors/w/n_rows", True), "tensors.w.n_rows"),
    "no shards": (with_shards(), "columns from 0 on are held by no rank"),
    "a shard twice": (with_shards(ALL, ALL), "held by no rank, or by two"),
    "shards that overlap": (with_shards([0, 0, 24, 0, 13], [0, 0, 24, 12, 24]), "held by no rank, or by two"),
    "shards with a gap": (with_shards([0, 0, 24, 0, 11], [0, 0, 24, 12, 24]), "held by no rank, or by two"),
    "a shard that is too long": (with_shards([0, 0, 24, 0, 25]), "held by no rank, or by two"),
    "a shard that ends before it starts": (with_shards([0, 0, 24, 24, 1]), "held by no rank, or by two"),
    "columns that overlap": (with_shards([0, 0, 13, 0, 13], [0, 12, 12, 0, 12]), "held by no rank, or by two"),
    "columns beyond the end": (with_shards([0, 0, HUGE, 0, HUGE]), "are held by no rank"),
    "a shard of a negative rank": (with_shards([-1, *ALL[1:]]), "tensors.w.shards.0.0"),
    "a shard of a rank without a file": (with_shards([1, *ALL[1:]]), "is in ['rank-00001.safetensors']"),
    "a shard of a huge rank": (with_shards([HUGE, *ALL[1:]]), f"rank-{HUGE}"),
    "a shard of four integers": (with_shards(ALL[:4]), "tensors.w.shards.0.4"),
    "a tensor that is in no file": (lambda t: t["tensors"].update(v=t["tensors"]["w"]), "master/v"),
    "all of a huge tensor": (
        lambda t: t["tensors"].update(w={"shape": [HUGE], "n_rows": 1, "row_width": HUGE, "shards": [[0, 0, HUGE, 0, HUGE]]}),
        f"is F32 [24], but the manifest says F32 [{HUGE}]",
    ),
    "a parameter with terminal escapes": (renamed("w\x1b[2J\n"), r"tensors.w\x1b[2J\n.[key]"),
    "a parameter without a name": (renamed(""), "tensors"),
    "a parameter with a path": (renamed("../w"), "tensors.../w"),
    "a kind that is in no file": (set_at("kinds", ["master", "exp_avg", "momentum"]), "momentum/w"),
    "a kind twice": (set_at("kinds", ["master", "exp_avg", "exp_avg"]), "each only once"),
    "no kinds": (set_at("kinds", []), "must hold 'master'"),
    "kinds without the weights": (set_at("kinds", ["exp_avg"]), "must hold 'master'"),
    "too many kinds": (set_at("kinds", ["master"] * 1000), "kinds"),
    "a kind with terminal escapes": (set_at("kinds", ["master", "\x1b[2J"]), "kinds.1"),
    "a file of another size": (set_at(f"files/{RANK_FILE}/n_bytes", 1), f"{RANK_FILE}: has "),
    "a file of a negative size": (set_at(f"files/{RANK_FILE}/n_bytes", -1), f"files.{RANK_FILE}.n_bytes"),
    "a file of 2**64 bytes": (set_at(f"files/{RANK_FILE}/n_bytes", 1 << 64), f"files.{RANK_FILE}.n_bytes"),
    "a malformed hash": (set_at(f"files/{RANK_FILE}/sha256", "f" * 63 + "\n"), f"files.{RANK_FILE}.sha256"),
    "no router": (without(f"files/{ROUTER_FILE}"), f"['{ROUTER_FILE}'] is not among the files"),
    "no config": (without(f"files/{CONFIG_FILE}"), f"['{CONFIG_FILE}'] is not among the files"),
    "no ranks": (without(f"files/{RANK_FILE}"), "which is not among the files"),
    "another version": (set_at("format_version", 4), "format_version=4 must be one of [2, 3]; use the version of Turnout that wrote it"),
    "a version with terminal escapes": (set_at("format_version", "\x1b[2J" * 50), r"format_version='\x1b[2J"),
    "a version that is true": (set_at("format_version", True), "format_version"),
    "no version": (without("format_version"), "format_version"),
    "an unknown field": (set_at("hook", "x"), "hook: Extra inputs"),
    "an unknown field of a tensor": (set_at("tensors/w/dtype", "F64"), "tensors.w.dtype: Extra inputs"),
    "another step": (set_at("state/step", 8), "holds step 8"),
    "a negative step": (set_at("state/step", -7), "state.step"),
    "a step that is a string": (set_at("state/step", "7"), "state.step"),
    "tokens beyond 64 bits": (set_at("state/tokens_seen", 1 << 64), "state.tokens_seen"),
    "a world without ranks": (set_at("saved_layout/world_size", 0), "saved_layout.world_size"),
    "an optimizer with a string": (set_at("state/optimizer/step", "nan"), "state.optimizer.step"),
    "an optimizer with a number beyond floats": (set_at("state/optimizer/step", 10**400), "state.optimizer.step"),
    "an optimizer with terminal escapes": (set_at("state/optimizer/\x1b[2J", 1.0), "state.optimizer"),
    "a loss scale that is a string": (set_at("state/loss_scaler/cur_scale", "inf"), "state.loss_scaler.cur_scale"),
    "a guard with a string": (set_at("state/guard/n_losses", "5"), "state.guard"),
    "a guard without a mean": (without("state/guard/mean"), "state.guard"),
    "a guard with an unknown field": (set_at("state/guard/hook", 1), "which the guard does not know"),
    "a window that ends before it starts": (set_at("state/skipped", [{"first": 3, "last": 2, "reason": ""}]), "state.skipped.0"),
    "a window with a huge end": (set_at("state/skipped", [{"first": 3, "last": 1 << 80, "reason": ""}]), "beyond 2**63"),
    "data that is a number": (set_at("data/corpus_hash", 5), "data.corpus_hash"),
}  # fmt: skip


@pytest.mark.parametrize(("lie", "words"), LIES.values(), ids=LIES.keys())
def test_a_manifest_with_a_false_claim_is_refused_by_field(
    lie: Callable[[Tree], None], words: str, path: Path
) -> None:
    tree = json.loads((path / MANIFEST).read_bytes())
    lie(tree)
    put_manifest(path, json.dumps(tree))
    assert words in refusal(path)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return change


# name: (the change to the manifest's text, part of the error message)
TEXTS: dict[str, tuple[Callable[[str], str], str]] = {
    "nothing": (lambda _: "", "not a manifest"),
    "zeros": (lambda text: "\0" * len(text), "not a manifest"),
    "a list": (lambda text: f"[{text}]", "Input should be"),
    "null": (lambda _: "null", "Input should be"),
    "half of it": (lambda text: text[: len(text) // 2], "not a manifest"),
    "more after it": (lambda text: text + "{}", "not a manifest"),
    "NaN": (replaced('"step":7.0', '"step":NaN'), "NaN is not a finite number"),
    "infinity": (replaced('"step":7.0', '"step":-Infinity'), "-Infinity is not a finite number"),
    "a number beyond floats": (replaced('"step":7.0', '"step":1e999'), "1e999 is not a finite number"),
    "a number of many digits": (replaced('"step":7.0', '"step":' + "9" * 100_000), "not a manifest"),
    "a key twice": (replaced('"step":7.0', '"step":7.0,"step":8.0'), "a key appears twice"),
    "files twice": (lambda text: '{"files":{},' + text[1:], "a key appears twice"),
    "deep nesting": (replaced('"step":7.0', '"step":' + "[" * 200_000 + "]" * 200_000), "RecursionError"),
    "deep nesting of objects": (replaced('"step":7.0', '"step":' + '{"a":' * 200_000 + "}" * 200_000), "RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_not_a_manifest_is_refused(change: Callable[[str], str], words: str, path: Path) -> None:
    put_manifest(path, change((path / MANIFEST).read_text()))
    message = refusal(path)
    assert words in message and message.startswith(f"{path / MANIFEST}: ")


def test_a_manifest_that_is_not_utf8_is_refused(path: Path) -> None:
    put_manifest(path, b'{"\xff\xfe": 1}')
    assert "not a manifest" in refusal(path)


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_SUM])
def test_a_manifest_of_terabytes_is_not_read(name: str, path: Path) -> None:
    os.truncate(path / name, 1 << 42)  # a sparse file, which needs no space
    assert f"{path / name}: is larger than" in refusal(path)


@pytest.mark.parametrize("command", ["verify", "show"])
def test_the_command_refuses_in_one_line(
    command: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads((path / MANIFEST).read_bytes())
    renamed("w\x1b[2J\n")(tree)
    put_manifest(path, json.dumps(tree))
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint", command, str(path)])
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out) == (4, "")
    assert printed.err.endswith("\n") and printed.err[:-1].isprintable()
