"""Which settings may change when a run is resumed: those that cannot change what it computes.

The layout, the micro-batch, recomputation and everything that is only monitored or written are free to
change. Any other change is refused by name, unless it was allowed by name.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from turnout.training.checkpoint.manifest import DataIdentity
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError, printable

# data.corpus: the path may change, but not the text; check_same_data compares the text.
FREE_TO_CHANGE = (
    "parallel",
    "train.microbatch_seqs",
    "train.recompute",
    "train.compile",
    "train.expert_backend",
    "data.corpus",
    "data.verify",
    "eval",
    "sample",
    "log",
    "checkpoint",
    "guard",
)

# The effect of a change that does not follow from the setting's name.
CONSEQUENCES = {"train.n_steps": "the learning rate continues on the schedule for the new number of steps"}


def check_same_run(saved: RunConfig, wanted: RunConfig, allowed: Collection[str]) -> list[str]:
    """Return the changes that are not free, as `optim.lr 0.001 -> 0.002`.

    allowed: settings that may change. It may name others, because a requeued job repeats its command.
    Raises ConfigError for a change that is not allowed.
    """
    old, new = dict(_settings(saved.model_dump(mode="json"))), dict(_settings(wanted.model_dump(mode="json")))
    paths = sorted(old.keys() | new.keys())
    changes = {
        path: f"{path} {old.get(path)} -> {new.get(path)}{_consequence(path)}"
        for path in paths
        if old.get(path) != new.get(path) and not _is_free(path)
    }
    if refused := [path for path in changes if path not in allowed]:
        raise ConfigError(
            f"the run has other settings: {', '.join(changes[path] for path in refused)}; change them back, "
            f"or allow the change: {' '.join(f'--allow-change {path}' for path in refused)}"
        )
    return list(changes.values())


def check_same_data(saved: DataIdentity, found: DataIdentity, allowed: Collection[str]) -> list[str]:
    """Return the change of the training text, if any. Raises ConfigError if it is not allowed."""
    if saved == found:
        return []
    what = "corpus_hash" if saved.corpus_hash != found.corpus_hash else "tokenizer_sha256"
    change = printable(f"data.corpus {what} {getattr(saved, what)[:12]} -> {getattr(found, what)[:12]}")
    if "data.corpus" not in allowed:
        raise ConfigError(
            f"the run has other text: {change}; use the old corpus, or allow the change: "
            "--allow-change data.corpus"
        )
    return [change]


def _consequence(path: str) -> str:
    return f" ({CONSEQUENCES[path]})" if path in CONSEQUENCES else ""


def _is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of each leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
