"""The run directory before the ranks start: made once, never over another run, and stamped with where it came
from.
"""

import json
import os
import platform
import socket
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from data.corpus import Corpus
from launch.settings import check_config, to_toml
from training.config import RunConfig
from training.errors import ConfigError

PACKAGES = ("turnout", "torch", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy")


def create_run_dir(path: Path, cfg: RunConfig, corpus: Corpus, *, nproc: int) -> None:
    """Make the directory with config.toml, provenance.json and logs/.

    Raises ConfigError where it holds anything already: a run is never written over another.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--run-dir {path} is a file; name a directory")
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"--run-dir {path} is not empty; name a new directory, or remove this one yourself")
    (path / "logs").mkdir(parents=True)
    (path / "config.toml").write_text(to_toml(cfg), encoding="utf-8")
    stamp = json.dumps(provenance(corpus, nproc=nproc, argv=sys.argv), indent=2)
    (path / "provenance.json").write_text(stamp + "\n", encoding="utf-8")


def read_config(run_dir: Path) -> RunConfig:
    """Return the resolved config that create_run_dir wrote."""
    path = run_dir / "config.toml"
    return check_config(tomllib.loads(path.read_text(encoding="utf-8")), str(path))


def provenance(corpus: Corpus, *, nproc: int, argv: Sequence[str]) -> dict[str, object]:
    """Return what is needed to tell two runs apart: code, versions, machine, corpus, command."""
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(argv),
        "nproc": nproc,
        "host": socket.gethostname(),
        "cpu": platform.processor() or platform.machine(),
        "n_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "corpus": str(corpus.path.resolve()),
        "corpus_hash": corpus.manifest.corpus_hash,
        "tokenizer_sha256": corpus.manifest.tokenizer_sha256,
    }
