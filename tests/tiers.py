"""`python -m tests.tiers quick|test|rest`: run the parts of a tier and print one summary.

quick   lint, types, and the tests that start no process
test    the tests of what README.md promises: layouts, resuming, damage, its commands, SLURM
rest    what `test` leaves out: redundant layouts, long schedules, Triton's interpreter, other clients

Parts in different lanes run at once. Every part runs, even after a failure. Exit code 1 if any failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "build" / "tests"
BIN = Path(sys.executable).parent
# By this path when the environment's own has a blank, with which torch could not compile.
PLAIN_ENV = Path(tempfile.gettempdir(), f"turnout-tests-{os.getpid()}")
PYTHON = str(PLAIN_ENV / "bin" / "python") if " " in sys.prefix else sys.executable
PYTEST = (PYTHON, "-m", "pytest")
# Two files at a time, in the order of the arguments. The tests of a file share its fixtures.
TWO_WORKERS = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")
N_SLOWEST = 12


@dataclass(frozen=True)
class Part:
    """A command of a tier. lane: parts of one lane run one after another."""

    name: str
    command: tuple[str, ...]
    lane: str = "main"

    @property
    def report(self) -> Path | None:
        """The file into which pytest writes the result of each test; None for another command."""
        return REPORTS / f"{self.name}.xml" if "pytest" in self.command else None


def tests(name: str, *arguments: str, lane: str = "main") -> Part:
    return Part(name, (*PYTEST, *arguments), lane)


def make(target: str) -> Part:
    return Part(target, ("make", "--no-print-directory", target))


QUICK = ("tests/unit", "tests/golden", "tests/architecture")
WITH_PROCESSES = ("tests/readme", "tests/distributed", "tests/processes", "tests/gpu")
TIERS = {
    "quick": [
        Part("ruff", (str(BIN / "ruff"), "check", ".")),
        Part("format", (str(BIN / "ruff"), "format", "--check", ".")),
        tests("quick", *QUICK, *TWO_WORKERS),
        Part("mypy", (str(BIN / "mypy"),), lane="types"),
    ],
    "test": [
        tests("main", *WITH_PROCESSES, *QUICK, "-m", "not long", *TWO_WORKERS),
        tests("slurm", "tests/slurm", "-m", "not long", lane="slurm"),
    ],
    "rest": [
        tests("long", *WITH_PROCESSES, "tests/bench", "-m", "long", *TWO_WORKERS),
        make("test-megablocks"),
        make("test-transformers4"),
        make("test-llamacpp"),
        tests("long-slurm", "tests/slurm", "-m", "long", lane="slurm"),
    ],
}


@dataclass
class Outcome:
    """The result of a part. failed: tests. skipped: number by reason. seconds: by test file."""

    part: Part
    code: int
    elapsed_s: float
    n_passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


def run(part: Part) -> Outcome:
    start_s, command = time.monotonic(), part.command
    if part.report is not None:
        part.report.unlink(missing_ok=True)
        command = (*command, f"--junitxml={part.report}")
    print(f"--- {part.name}: {' '.join(part.command)}", flush=True)
    code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    outcome = Outcome(part, code, time.monotonic() - start_s)
    if part.report is not None and part.report.exists():
        read_report(part.report, outcome)
    return outcome


def read_report(report: Path, outcome: Outcome) -> None:
    """Add the results of pytest's report to an outcome."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file, name = case.get("classname", ""), case.get("name", "")
        outcome.seconds[file] += float(case.get("time", 0))  # type: ignore[assignment]
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{file}::{name}")
        elif skipped is not None:
            outcome.skipped[skipped.get("message", "")] += 1
        else:
            outcome.n_passed += 1


def summarise(outcomes: Sequence[Outcome], elapsed_s: float) -> int:
    """Print the results of all parts; return the exit code."""
    print(f"\n{'part':20} {'minutes':>7} {'passed':>7} {'failed':>7} {'skipped':>7}  result")
    for one in outcomes:
        counts = (one.n_passed, len(one.failed), one.skipped.total())
        words = "passed" if one.code == 0 else f"FAILED (exit code {one.code})"
        print(
            f"{one.part.name:20} {one.elapsed_s / 60:7.1f} {counts[0]:7} {counts[1]:7} {counts[2]:7}  {words}"
        )
    seconds = sum((one.seconds for one in outcomes), Counter[str]())
    print("\nslowest files, in seconds:")
    for file, n_seconds in seconds.most_common(N_SLOWEST):
        print(f"{n_seconds:7.0f}  {file}")
    for reason, n in sum((one.skipped for one in outcomes), Counter[str]()).items():
        print(f"skipped {n}: {reason}")
    for test in (test for one in outcomes for test in one.failed):
        print(f"FAILED {test}")
    is_green = all(one.code == 0 for one in outcomes)
    print(f"\n{'all parts passed' if is_green else 'NOT ALL PARTS PASSED'} in {elapsed_s / 60:.1f} minutes")
    return 0 if is_green else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description=__doc__)
    parser.add_argument("tier", choices=TIERS)
    parts = TIERS[parser.parse_args().tier]
    REPORTS.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)  # so that commands also use this tree
    lanes: dict[str, list[Part]] = {}
    for part in parts:
        lanes.setdefault(part.lane, []).append(part)
    start_s = time.monotonic()
    has_link = sys.executable != PYTHON
    if has_link:
        PLAIN_ENV.symlink_to(sys.prefix)
    try:
        with ThreadPoolExecutor(len(lanes)) as pool:
            found = pool.map(lambda lane: [run(part) for part in lane], lanes.values())
            outcomes = [outcome for lane in found for outcome in lane]
    finally:
        if has_link:
            PLAIN_ENV.unlink()
    return summarise(outcomes, time.monotonic() - start_s)


if __name__ == "__main__":
    sys.exit(main())
