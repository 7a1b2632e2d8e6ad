"""The run directory before the ranks start: created once, never over another run.

Each attempt writes the resolved config and adds its provenance: versions, machine, corpus, command.
"""

import json
import os
import platform
import socket
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnout.data.files import write_atomically
from turnout.data.manifest import read_manifest
from turnout.launch.settings import check_config, to_toml
from turnout.launch.versions import package_versions
from turnout.training.checkpoint.directory import CHECKPOINTS
from turnout.training.checkpoint.manifest import CONFIG_FILE, PROVENANCE_FILE, Attached, DataIdentity
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError
from turnout.training.renames import PROVENANCE, rename_keys, rename_settings

if TYPE_CHECKING:
    from turnout.data.corpus import Corpus  # numpy, which `turnout status` does without

SUBMISSIONS = "slurm"  # in the run's directory


def create_run_dir(path: Path, cfg: RunConfig, corpus: "Corpus", *, nproc: int) -> None:
    """Create the directory with config.toml, provenance.json and logs/.

    Raises ConfigError where the directory is not empty, so that no run is overwritten, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--run-dir {path} is a file; name a directory")
    if path.exists() and any(path.iterdir()) and not _is_half_made(path):
        raise ConfigError(
            f"--run-dir {path} is not empty; resume the run in it with --resume, name a new directory, or "
            "remove this one yourself"
        )
    (path / "logs").mkdir(parents=True, exist_ok=True)
    _stamp(path, cfg, corpus, nproc=nproc)


def _is_half_made(path: Path) -> bool:
    """Return whether an attempt was killed here before it wrote its config."""
    written_first = {"logs", SUBMISSIONS, PROVENANCE_FILE, f"{PROVENANCE_FILE}.tmp", f"{CONFIG_FILE}.tmp"}
    return {entry.name for entry in path.iterdir()} <= written_first and not any((path / "logs").glob("*"))


def has_run(path: Path) -> bool:
    """Return whether the directory holds a run. Raises ConfigError where it holds anything else."""
    if (path / CONFIG_FILE).is_file() and (path / PROVENANCE_FILE).is_file():
        return True
    if (path / CHECKPOINTS).exists():
        raise ConfigError(
            f"--run-dir {path} has {CHECKPOINTS}/, but not both {CONFIG_FILE} and {PROVENANCE_FILE}; "
            "copy the whole run"
        )
    if path.is_dir() and any(path.iterdir()) and not _is_half_made(path):
        raise ConfigError(
            f"--run-dir {path} is not empty, but holds no run to resume ({CONFIG_FILE} and "
            f"{PROVENANCE_FILE}); name the run's directory, or a new one"
        )
    return False


def resume_run_dir(path: Path, cfg: RunConfig, corpus: "Corpus", *, nproc: int) -> None:
    """Prepare a run's directory for another attempt; only its config is overwritten, by the newest one."""
    (path / "logs").mkdir(exist_ok=True)
    _stamp(path, cfg, corpus, nproc=nproc)


def _stamp(path: Path, cfg: RunConfig, corpus: "Corpus", *, nproc: int) -> None:
    """Write the config, and add this attempt to the provenance."""
    attempts = _attempts(path) if (path / PROVENANCE_FILE).exists() else []
    attempts.append(provenance(corpus, nproc=nproc, argv=sys.argv))
    write_atomically(path / PROVENANCE_FILE, (json.dumps({"attempts": attempts}, indent=2) + "\n").encode())
    # Written last: a directory without it is not a run yet.
    write_atomically(path / CONFIG_FILE, to_toml(cfg).encode())


def _attempts(path: Path) -> list[dict[str, Any]]:
    file = path / PROVENANCE_FILE
    try:
        attempts = rename_keys(json.loads(file.read_bytes()), PROVENANCE)["attempts"]
        for attempt in attempts:
            DataIdentity(corpus_hash=attempt["corpus_hash"], tokenizer_sha256=attempt["tokenizer_sha256"])
        if not attempts or not isinstance(attempts, list):
            raise ValueError("it lists no attempt")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as err:
        what = f"{type(err).__name__}: {str(err).splitlines()[0]}"
        raise ConfigError(f"{file}: damaged ({what}); replace it with a good copy") from err
    return attempts


def read_config(directory: Path) -> RunConfig:
    """Return the resolved config in a run's directory, or in one of its checkpoints. Raises ConfigError."""
    path = directory / CONFIG_FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: cannot be read: {err}; replace it with a good copy") from err
    return check_config(rename_settings(tree), str(path))


def identity_of(corpus: "Corpus") -> DataIdentity:
    """Return the hashes that identify a corpus and its tokenizer."""
    return DataIdentity(
        corpus_hash=corpus.manifest.corpus_hash, tokenizer_sha256=corpus.manifest.tokenizer_sha256
    )


def data_identity(run_dir: Path) -> DataIdentity:
    """Return which corpus and tokenizer the newest attempt of a run read."""
    newest = _attempts(run_dir)[-1]
    return DataIdentity(corpus_hash=newest["corpus_hash"], tokenizer_sha256=newest["tokenizer_sha256"])


def attachments(run_dir: Path, cfg: RunConfig) -> Attached:
    """Return the files that each checkpoint holds beside its tensors, so that it is usable on its own."""
    manifest = read_manifest(Path(cfg.data.corpus))
    tokenizer = Path(cfg.data.corpus) / manifest.tokenizer_file
    files = [run_dir / CONFIG_FILE, run_dir / PROVENANCE_FILE, tokenizer]
    return Attached(data_identity(run_dir), {path.name: path.read_bytes() for path in files})


def provenance(corpus: "Corpus", *, nproc: int, argv: Sequence[str]) -> dict[str, object]:
    """Return what tells two attempts apart: versions, machine, corpus, command."""
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(argv),
        "nproc": nproc,
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "n_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "corpus": str(corpus.path.resolve()),
        "corpus_hash": corpus.manifest.corpus_hash,
        "tokenizer_sha256": corpus.manifest.tokenizer_sha256,
    }


def _cpu_model() -> str:
    """Return the processor's name as Linux reports it, or its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()
