"""What a job needs, kept as it was when the job was submitted.

    RUN/slurm/submit-00001/  job.sh            the batch script
                             submission.json   the fields of Submission
                             recipe.toml       the resolved config
                             code/             the packages of turnout
                             fabric.env        NCCL and fabric variables

Submitting a run again makes another directory, so the files of a waiting job never change.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from turnout.data.files import sha256_of, write_atomically
from turnout.launch.versions import package_versions

SUBMISSION_FILE, RECIPE_FILE, CODE = "submission.json", "recipe.toml", "code"
PASSED = "passed"  # a file that a preflight leaves if it finds no problem
SUFFIXES = {".py", ".toml", ".sh", ".env"}


@dataclass(frozen=True)
class Submission:
    """The job's options, and the code and package versions that each of its nodes must have.

    n_bytes        size of one checkpoint
    srun_options   for the srun of the ranks, a container's for example
    is_chain       the job is one of a chain, and is not requeued
    is_preflight   only check the nodes
    """

    ranks_per_node: int
    has_gpus: bool
    warn_s: int
    max_failures: int
    n_bytes: int
    allowed_changes: tuple[str, ...]
    srun_options: dict[str, str]
    is_chain: bool
    is_preflight: bool
    code_sha256: str
    recipe_sha256: str
    python: str
    packages: dict[str, str]


def snapshot(directory: Path, recipe: str) -> dict[str, object]:
    """Copy code and recipe into a submission's directory; return their hashes and the package versions."""
    with resources.as_file(resources.files("turnout")) as source:
        for path in _sources(source):
            target = directory / CODE / "turnout" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    write_atomically(directory / RECIPE_FILE, recipe.encode())
    return {
        "code_sha256": code_sha256(directory),
        "recipe_sha256": sha256_of(directory / RECIPE_FILE),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def code_sha256(directory: Path) -> str:
    """Return one hash over the names and contents of all files of a submission's code."""
    digest = hashlib.sha256()
    for path in sorted(_sources(directory / CODE)):
        digest.update(f"{path.relative_to(directory)}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def _sources(directory: Path) -> Iterator[Path]:
    # Not rglob, which follows no links: in a clone turnout/ holds links to the packages.
    for parent, _, names in os.walk(directory, followlinks=True):
        yield from (Path(parent, name) for name in names if Path(name).suffix in SUFFIXES)


def write_submission(directory: Path, submission: Submission) -> None:
    write_atomically(directory / SUBMISSION_FILE, (json.dumps(asdict(submission), indent=2) + "\n").encode())


def read_submission(directory: Path) -> Submission:
    fields = json.loads((directory / SUBMISSION_FILE).read_bytes())
    return Submission(**{**fields, "allowed_changes": tuple(fields["allowed_changes"])})
