"""Names of earlier releases and their names today, in one place: old name -> new name.

Files that an earlier release wrote are read silently, with the old names replaced. An old name that a user
types is an error that names the new one (launch/settings.py, launch/cli/main.py).
"""

from collections.abc import Mapping
from typing import Any

COMMANDS = {"routes": "experts"}
SETTINGS = {"parallel.ep_trips": "parallel.ep_chunks", "checkpoint.is_async": "checkpoint.async_save"}
METRICS = {"router/dropped_tokens": "router/dropped_rows", "perf/extra_trips": "perf/extra_chunks"}
PROVENANCE = {"starts": "attempts"}
MANIFEST, MANIFEST_TENSOR = {"saved_at": "saved_layout"}, {"pieces": "shards"}
ATTEMPT_DIR, EARLIER_ATTEMPT_DIR = "attempt", "start"  # directories in logs/, as attempt-00001


def rename_keys(fields: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields under today's names; a field with any other name is unchanged.

    So is an old name beside its new one: neither value may replace the other in silence.
    """
    return {
        name if new_names.get(name) in fields else new_names.get(name, name): value
        for name, value in fields.items()
    }


def rename_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as plain values, {section: {name: value}}, with today's names.

    An old name beside its new one stays, so that the check of the config refuses it.
    """
    renamed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in tree.items()}
    for old, new in SETTINGS.items():
        (old_section, _, old_name), (new_section, _, new_name) = old.rpartition("."), new.rpartition(".")
        section = renamed.get(old_section)
        if not isinstance(section, dict) or old_name not in section:
            continue
        target = renamed.setdefault(new_section, {})
        if isinstance(target, dict) and new_name not in target:
            target[new_name] = section.pop(old_name)
    return renamed


def rename_manifest(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's manifest as plain values with today's names."""
    renamed = rename_keys(tree, MANIFEST)
    if isinstance(tensors := renamed.get("tensors"), Mapping):
        renamed["tensors"] = {
            name: rename_keys(entry, MANIFEST_TENSOR) if isinstance(entry, Mapping) else entry
            for name, entry in tensors.items()
        }
    return renamed
