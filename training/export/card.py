"""The model card: what the weights are, where they come from, and how well they did."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnout.moe.config import ModelConfig
from turnout.moe.flops import n_active_params, n_params
from turnout.training.checkpoint.manifest import CONFIG_FILE, PROVENANCE_FILE, Manifest
from turnout.training.errors import printable
from turnout.training.renames import PROVENANCE, rename_keys

CARD = "README.md"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from. A field is None where nothing records it.

    trained_by     the command of the run's newest attempt
    recipe         the resolved config of the training, TOML
    bits_per_byte  of the validation split, at this step
    """

    step: int
    tokens_seen: int
    corpus_hash: str
    trained_by: str | None
    recipe: str | None
    bits_per_byte: float | None


def origin_of(checkpoint: Path, manifest: Manifest) -> Origin:
    """Return what a checkpoint, and the run directory that may still surround it, record about its origin."""
    state = manifest.state
    return Origin(
        step=state.step,
        tokens_seen=state.tokens_seen,
        corpus_hash=manifest.data.corpus_hash,
        trained_by=_training_command(checkpoint / PROVENANCE_FILE),
        recipe=_text_of(checkpoint / CONFIG_FILE),
        bits_per_byte=_bits_per_byte(checkpoint.parent.parent / METRICS, state.step),
    )


def model_card(
    cfg: ModelConfig, origin: Origin | None, *, library: str, files: str, command: Sequence[str], proof: str
) -> str:
    """Return the text of README.md.

    library  the library that loads the files, as the Hugging Face hub calls it
    files    what the files are, one sentence
    command  the command that wrote them
    proof    how they were checked, in words
    """
    facts = {
        "parameters": f"{n_params(cfg):,} ({n_active_params(cfg):,} active per token)",
        "layers": f"{cfg.n_layers}, {cfg.n_dense_layers} of them dense",
        "experts": f"{cfg.n_experts}, {cfg.top_k} per token, and {cfg.n_shared_experts} shared",
        "vocabulary": f"{cfg.vocab_size:,}",
        "sequence length": f"{cfg.seq_len:,}",
    }
    if origin is not None:
        facts["step"] = f"{origin.step:,}"
        facts["tokens seen"] = f"{origin.tokens_seen:,}"
        facts["corpus"] = printable(origin.corpus_hash)
        if origin.bits_per_byte is not None:
            facts["held-out text"] = f"{origin.bits_per_byte:.4f} bits per byte"
    facts["checked"] = proof
    rows = "\n".join(f"| {name} | {_in_cell(value)} |" for name, value in facts.items())
    listings = {"Exported by": shlex.join(command)}
    if origin is not None and origin.trained_by is not None:
        listings["Trained by"] = origin.trained_by
    if origin is not None and origin.recipe is not None:
        listings["The recipe, resolved"] = origin.recipe
    return (
        f"---\nlibrary_name: {library}\ntags:\n- mixture-of-experts\n---\n\n"
        "# Mixture-of-Experts language model\n\n"
        f"Pretrained with Turnout. {files}\n\n| | |\n|---|---|\n{rows}\n\n"
        "It continues text; it was not tuned to follow instructions. Text never becomes a control token,\n"
        "and every document of training began with the begin-of-text token.\n"
        + "".join(f"\n{title}:\n\n{_listing(text)}" for title, text in listings.items())
    )


def _in_cell(value: str) -> str:
    """Return text escaped for a Markdown table."""
    return "".join(f"\\{char}" if char in "\\|`*_<[" else char for char in value)


def _listing(text: str) -> str:
    """Return text as an indented block, which Markdown shows verbatim; text could close a fence."""
    return "".join(f"    {printable(line, len(line) + 1)}\n" for line in text.splitlines())


def _training_command(path: Path) -> str | None:
    try:
        command = rename_keys(json.loads(path.read_bytes()), PROVENANCE)["attempts"][-1]["command"]
        return shlex.join(map(str, command))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _bits_per_byte(path: Path, step: int) -> float | None:
    found: Any = None
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if "eval/bits_per_byte" in line and (row := json.loads(line)).get("step") == step:
                    found = row["eval/bits_per_byte"]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return float(found) if isinstance(found, int | float) else None
