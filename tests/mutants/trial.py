"""Trials of mutants, each in a copy of the tree; the tree itself is never changed."""

import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.mutants.table import Mutant, broken_text

TIMEOUT_S = 300
PASSED, FAILED = 0, 1  # pytest's exit codes; any other means that no test ran
Verdict = Literal["killed", "survived", "not applied"]


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    verdict: Verdict
    seconds: float
    detail: str


class Trials:
    """Copies of the tree, one for each trial that runs at the same time."""

    def __init__(self, root: Path, n_copies: int) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="mutants-"))
        self._free: queue.Queue[Path] = queue.Queue()
        # Python recognises an outdated compiled file by its source's size and time in whole seconds.
        self._times = itertools.count(1_000_000_000)
        for i in range(n_copies):
            copy = self._directory / f"copy {i}"
            copy_tree(root, copy)
            self._free.put(copy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def check_unbroken(self, mutants: Sequence[Mutant]) -> str:
        """Run all named tests on the unbroken tree; return pytest's last lines if one does not pass."""
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        copy = self._free.get()
        try:
            code, output = run_tests(copy, tests, timeout_s=len(tests) * TIMEOUT_S)
        finally:
            self._free.put(copy)
        return "" if code == PASSED else output

    def run(self, mutant: Mutant) -> Result:
        """Break a copy, run the mutant's tests on it, and restore it."""
        copy, start_s = self._free.get(), time.monotonic()
        path = copy / mutant.file
        try:
            whole = path.read_text(encoding="utf-8") if path.exists() else ""
            if (broken := broken_text(mutant, whole)) is None:
                detail = f"{mutant.file} does not hold the text exactly once:\n{mutant.old}"
                return Result(mutant, "not applied", 0.0, detail)
            try:
                self._write(path, broken)
                code, output = run_tests(copy, mutant.tests, timeout_s=TIMEOUT_S)
            finally:
                self._write(path, whole)
        finally:
            self._free.put(copy)
        elapsed_s = time.monotonic() - start_s
        if code == FAILED:
            return Result(mutant, "killed", elapsed_s, "")
        if code == PASSED:
            return Result(mutant, "survived", elapsed_s, f"{', '.join(mutant.tests)} passed")
        return Result(mutant, "not applied", elapsed_s, f"no test ran (exit code {code}):\n{output}")

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        time_s = next(self._times)
        os.utime(path, (time_s, time_s))


def copy_tree(root: Path, copy: Path) -> None:
    """Copy the working tree's files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name, follow_symlinks=False)


def run_tests(copy: Path, tests: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
    """Return pytest's exit code and its last lines. A test that hangs counts as failed."""
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "--no-header", *tests],
        cwd=copy,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return FAILED, f"no result after {timeout_s:.0f} s"
    return process.returncode, "\n".join(output.splitlines()[-25:])
