"""The versions of the packages that a run's numbers depend on, as installed here."""

from importlib import metadata

PACKAGES = ("turnout", "torch", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy")


def package_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
