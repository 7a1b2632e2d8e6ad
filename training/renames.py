"""Names that earlier releases used, and what they are called now: one table for everything that was renamed.

Files that an earlier release wrote are read with today's names, in silence. An old name that a person types is
refused with the new one (launch/settings.py, launch/cli/main.py).
"""

from collections.abc import Mapping
from typing import Any

COMMANDS = {"routes": "experts"}
SETTINGS = {"parallel.ep_trips": "parallel.ep_chunks", "checkpoint.is_async": "checkpoint.async_save"}
METRICS = {"router/dropped_tokens": "router/dropped_rows", "perf/extra_trips": "perf/extra_chunks"}
PROVENANCE = {"starts": "attempts"}
MANIFEST, MANIFEST_TENSOR = {"saved_at": "saved_layout"}, {"pieces": "shards"}
ATTEMPT_DIR, EARLIER_ATTEMPT_DIR = "attempt", "start"  # in logs/, before a hyphen and a number


def rename_keys(fields: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields with today's names; a field that has today's name already is kept as it is."""
    return {new_names.get(name, name): value for name, value in fields.items()}


def rename_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of settings, of plain values, with today's names."""
    renamed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in tree.items()}
    for old, new in SETTINGS.items():
        (old_section, _, old_name), (new_section, _, new_name) = old.rpartition("."), new.rpartition(".")
        section = renamed.get(old_section)
        if isinstance(section, dict) and old_name in section:
            renamed.setdefault(new_section, {})[new_name] = section.pop(old_name)
    return renamed


def rename_manifest(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's manifest, of plain values, with today's names."""
    renamed = rename_keys(tree, MANIFEST)
    if isinstance(tensors := renamed.get("tensors"), Mapping):
        renamed["tensors"] = {
            name: rename_keys(entry, MANIFEST_TENSOR) if isinstance(entry, Mapping) else entry
            for name, entry in tensors.items()
        }
    return renamed
