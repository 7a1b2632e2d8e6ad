"""The installed versions of the packages that a run's results depend on."""

from importlib import metadata

from turnout import __version__

PACKAGES = ("torch", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy")


def package_versions() -> dict[str, str]:
    """Return the version of turnout and of each of PACKAGES, by name."""
    return {"turnout": __version__, **{name: metadata.version(name) for name in PACKAGES}}
