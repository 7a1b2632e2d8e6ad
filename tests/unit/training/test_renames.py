"""Files of an earlier release are read under today's names, and nothing else in them changes."""

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.saved_fixtures import turnout
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.attempt_records import read_attempts
from turnout.launch.run_dir import read_config
from turnout.launch.settings import setting_paths
from turnout.training.checkpoint.manifest import Manifest, TensorEntry
from turnout.training.renames import (
    ATTEMPT_DIR,
    COMMANDS,
    EARLIER_ATTEMPT_DIR,
    MANIFEST,
    MANIFEST_TENSOR,
    METRICS,
    PROVENANCE,
    SETTINGS,
    rename_keys,
    rename_manifest,
    rename_settings,
)

OLD_RUN = Path(__file__).parents[2] / "old_run" / "a31d440" / "run"


def test_the_table_is_complete() -> None:
    """Files of earlier releases have these names, so no entry may be lost."""
    assert COMMANDS == {"routes": "experts"}
    assert SETTINGS == {
        "parallel.ep_trips": "parallel.ep_chunks",
        "checkpoint.is_async": "checkpoint.async_save",
    }
    assert METRICS == {
        "router/dropped_tokens": "router/dropped_rows",
        "perf/extra_trips": "perf/extra_chunks",
    }
    assert PROVENANCE == {"starts": "attempts"}
    assert (MANIFEST, MANIFEST_TENSOR) == ({"saved_at": "saved_layout"}, {"pieces": "shards"})
    assert (EARLIER_ATTEMPT_DIR, ATTEMPT_DIR) == ("start", "attempt")


@pytest.mark.parametrize(
    ("table", "names_today"),
    [
        pytest.param(SETTINGS, set(setting_paths()), id="settings"),
        pytest.param(MANIFEST, set(Manifest.model_fields), id="manifest"),
        pytest.param(MANIFEST_TENSOR, set(TensorEntry.model_fields), id="manifest's tensors"),
    ],
)
def test_the_new_names_exist_and_the_old_ones_do_not(table: dict[str, str], names_today: set[str]) -> None:
    assert set(table.values()) <= names_today and not set(table) & names_today


def test_an_old_command_is_an_error_that_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in COMMANDS.items():
        assert turnout(old, "run") == 2
        assert f"`turnout {new}`" in capsys.readouterr().err
        assert turnout(new, "--help") == 0


def test_only_old_keys_are_renamed() -> None:
    fields = {"saved_at": 1, "saved_layout_of": 2, "pieces": [3]}
    before = copy.deepcopy(fields)
    assert rename_keys(fields, MANIFEST) == {"saved_layout": 1, "saved_layout_of": 2, "pieces": [3]}
    assert fields == before, "the argument is not changed"
    today = {"saved_layout": 1}
    assert rename_keys(today, MANIFEST) == today


def test_a_setting_is_renamed_within_its_section_only() -> None:
    tree = {"parallel": {"ep_trips": 3, "tp": 1}, "checkpoint": {"is_async": False}, "log": {"is_async": 1}}
    before = copy.deepcopy(tree)
    assert rename_settings(tree) == {
        "parallel": {"ep_chunks": 3, "tp": 1},
        "checkpoint": {"async_save": False},
        "log": {"is_async": 1},
    }
    assert tree == before, "the argument is not changed"


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"parallel": {"ep_chunks": 3}, "checkpoint": {"async_save": True}}, id="today's names"),
        pytest.param({"parallel": 3, "checkpoint": ["is_async"]}, id="no sections"),
        pytest.param({"ep_trips": 3, "parallel.ep_trips": 3}, id="names outside their section"),
    ],
)
def test_other_settings_are_unchanged(tree: dict[str, Any]) -> None:
    assert rename_settings(tree) == tree


@pytest.mark.parametrize("section", [{}, {"train": {"seed": 1}}], ids=["new section", "known section"])
def test_a_setting_may_move_to_another_section(
    section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "log.old", "train.new")
    renamed = rename_settings({"log": {"old": 5, "every_steps": 1}, **section})
    assert renamed == {"log": {"every_steps": 1}, "train": {**section.get("train", {}), "new": 5}}


def test_a_manifest_is_renamed_at_both_levels() -> None:
    tree = {
        "saved_at": {"tp": 1},
        "pieces": "not a tensor's",
        "tensors": {"w": {"shape": [2], "pieces": [[0, 0, 2, 0, 2]]}, "pieces": {"shards": []}},
    }
    before = copy.deepcopy(tree)
    renamed = rename_manifest(tree)
    assert renamed == {
        "saved_layout": {"tp": 1},
        "pieces": "not a tensor's",
        "tensors": {"w": {"shape": [2], "shards": [[0, 0, 2, 0, 2]]}, "pieces": {"shards": []}},
    }
    assert tree == before, "the argument is not changed"
    assert rename_manifest(renamed) == renamed


@pytest.mark.parametrize(
    "tree", [{}, {"tensors": None}, {"tensors": [{"pieces": 1}]}, {"tensors": {"w": ["pieces"]}}], ids=str
)
def test_a_malformed_manifest_is_left_to_its_check(tree: dict[str, Any]) -> None:
    assert rename_manifest(tree) == tree


def test_the_config_of_an_earlier_release_is_read() -> None:
    old = tomllib.loads((OLD_RUN / "config.toml").read_text())
    assert "ep_trips" in old["parallel"] and "is_async" in old["checkpoint"]
    cfg = read_config(OLD_RUN)
    assert cfg.parallel.ep_chunks == old["parallel"]["ep_trips"] == 2
    assert cfg.checkpoint.async_save == old["checkpoint"]["is_async"] is True


def test_the_metrics_and_the_provenance_of_an_earlier_release_are_renamed() -> None:
    rows = [json.loads(line) for line in (OLD_RUN / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "router/dropped_tokens" in row]  # evaluations have no such metric
    assert rows
    for row in rows:
        renamed = rename_keys(row, METRICS)
        assert renamed.pop("router/dropped_rows") == row.pop("router/dropped_tokens")
        assert renamed.pop("perf/extra_chunks") == row.pop("perf/extra_trips")
        assert renamed == row
    old = json.loads((OLD_RUN / "provenance.json").read_bytes())
    assert rename_keys(old, PROVENANCE) == {"attempts": old["starts"]}


def test_the_attempts_of_an_earlier_release_are_listed_and_counted(tmp_path: Path) -> None:
    (record,) = read_attempts(OLD_RUN)
    assert record.directory == OLD_RUN / "logs" / "start-00001"
    (tmp_path / "start-00001").mkdir()
    assert make_attempt_dir(tmp_path) == tmp_path / "attempt-00002"
    assert make_attempt_dir(tmp_path) == tmp_path / "attempt-00003"


def test_neither_of_two_names_for_one_thing_replaces_the_other() -> None:
    assert rename_keys({"saved_at": 1, "saved_layout": 2}, MANIFEST) == {"saved_at": 1, "saved_layout": 2}
    both = {"parallel": {"ep_trips": 1, "ep_chunks": 4}}
    assert rename_settings(both) == both, "so that the check of the config refuses the old one"


def test_attempts_of_two_releases_are_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    began = {"attempt-00002": 20.0, "start-00001": 10.0, "start-00003": 30.0}
    for name, began_s in began.items():
        (directory := tmp_path / "logs" / name).mkdir(parents=True)
        begin = {"began_s": began_s, "nodes": ["n1"], "n_ranks": 1, "from_step": 0, "pid": 1}
        (directory / "begin.json").write_text(json.dumps(begin))
    names = [record.directory.name for record in read_attempts(tmp_path)]
    assert names == ["start-00001", "attempt-00002", "start-00003"]
