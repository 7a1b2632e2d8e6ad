"""The names of the files in a Hugging Face directory. Imports no torch, so that refusals are quick."""

from pathlib import Path

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


def is_hf_directory(path: Path) -> bool:
    """Return whether a directory looks like Hugging Face's: a config and safetensors beside it."""
    return (path / CONFIG).is_file() and ((path / INDEX).is_file() or (path / SINGLE).is_file())
