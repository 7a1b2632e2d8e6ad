"""CPU seconds of commands until they answer: `python -m tests.bench start-up`.

User and system seconds of all their processes. TURNOUT_BENCH_OTHER can name the Python of another tree, such
as ../old/.venv/bin/python: its commands then take turns with this tree's.
"""

import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tests.bench.command import small_corpus
from tests.bench.rows import Row
from tests.bench.side_by_side import over

OTHER = "TURNOUT_BENCH_OTHER"
N_ROUNDS = 5
TIMEOUT_S = 120
# Upper limits, in seconds.
TARGETS_S = {"first step": 5.0, "help": 0.5, "refusal": 0.5, "status": 0.5}


def start_up_rows() -> list[Row]:
    pythons = {"this tree": sys.executable}
    if other := os.environ.get(OTHER):
        pythons["the other"] = other
    with small_corpus() as corpus:
        finished = train_one_step(corpus)
        measure: dict[str, Callable[[str], float]] = {
            "first step": lambda python: seconds_to_first_step(python, corpus),
            "help": lambda python: seconds_of(python, ["--help"]),
            "refusal": lambda python: seconds_of(
                python, ["train", "tiny", "--run-dir", "run", "--set", "train.nsteps=3"], code=2
            ),
            "status": lambda python: seconds_of(python, ["status", str(finished)]),
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(N_ROUNDS):
            for what, run in measure.items():
                for tree, python in pythons.items():
                    seconds.setdefault((what, tree), []).append(run(python))
    return [row for what in measure for row in rows_of(what, seconds)]


def rows_of(what: str, seconds: Mapping[tuple[str, str], list[float]]) -> list[Row]:
    here = seconds[what, "this tree"]
    rows = [Row.of(f"CPU seconds, {what}", here, at_most=TARGETS_S[what])]
    if there := seconds.get((what, "the other")):
        note = f"the other {statistics.median(there):.2f} s"
        rows.append(Row.of(f"over the other tree, {what}", over(here, there), note=note))
    return rows


def seconds_of(python: str, arguments: list[str], code: int = 0) -> float:
    """Return the CPU seconds of a command and all its processes."""
    before = _of_children()
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [python, "-m", "turnout", *arguments], cwd=directory, capture_output=True, text=True
        )
    assert done.returncode == code, done.stderr
    return _of_children() - before


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train_one_step(corpus: Path) -> Path:
    """Return the directory of a run that has a row and a checkpoint."""
    run_dir = corpus.parent / "finished"
    settings = [
        "train.n_steps=1",
        "optim.schedule.warmup_steps=0",
        "eval.max_documents=1",
        "sample.prompts=[]",
    ]
    command = [sys.executable, "-m", "turnout", "train", "tiny", "--run-dir", str(run_dir)]
    command += [word for one in (f"data.corpus={corpus}", *settings) for word in ("--set", one)]
    subprocess.run(command, check=True, capture_output=True)
    return run_dir


def seconds_to_first_step(python: str, corpus: Path) -> float:
    """Return the CPU seconds of `turnout train tiny` on one rank until its first row of metrics."""
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "run" / "metrics.jsonl"
        command = [python, "-m", "turnout", "train", "tiny", "--run-dir", str(rows.parent)]
        command += ["--set", f"data.corpus={corpus}", "--set", "log.every_steps=1"]
        train = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline_s = time.monotonic() + TIMEOUT_S
            while not (rows.exists() and rows.stat().st_size):
                assert train.poll() is None and time.monotonic() < deadline_s, "no first step"
                time.sleep(0.005)
            command_process = psutil.Process(train.pid)
            processes = [command_process, *command_process.children(recursive=True)]
            return sum(sum(process.cpu_times()[:4]) for process in processes)
        finally:
            train.send_signal(signal.SIGINT)
            train.wait(TIMEOUT_S)
