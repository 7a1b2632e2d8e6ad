"""The versions of the packages that a run's numbers depend on, as installed here."""

from importlib import metadata

from turnout import __version__

PACKAGES = ("torch", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy")


def package_versions() -> dict[str, str]:
    return {"turnout": __version__, **{name: metadata.version(name) for name in PACKAGES}}
