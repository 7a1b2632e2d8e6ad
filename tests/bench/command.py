"""The real commands: `turnout prepare`, and `turnout train tiny` by precision, backend and layout."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.rows import Row
from tests.bench.side_by_side import GLIBC_DEFAULTS, over
from tests.runs import read_rows

N_ROUNDS = 3


@dataclass(frozen=True)
class Measurement:
    speed: float  # in the unit of its rows
    peak_gib: float | None = None


Measure = Callable[[], Measurement]


def turnout(*arguments: str, **env: str) -> None:
    command = [sys.executable, "-m", "turnout", *arguments]
    subprocess.run(command, env={**os.environ, **env}, check=True, stdout=subprocess.DEVNULL, timeout=600)


@contextmanager
def small_corpus() -> Iterator[Path]:
    """Make the corpus of the `tiny` recipe, and remove it at the end."""
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        turnout("prepare", "--embedded", "--vocab-size", "4096", "--out", str(corpus))
        yield corpus


def prepare(workers: int) -> Measurement:
    with tempfile.TemporaryDirectory() as directory:
        start_s = time.perf_counter()
        out = Path(directory) / "corpus"
        turnout("prepare", "--embedded", "--vocab-size", "4096", "--out", str(out), "--workers", str(workers))
        elapsed_s = time.perf_counter() - start_s
        manifest = json.loads((out / "corpus.json").read_text())
        n_bytes = sum(
            split["n_text_bytes"] for source in manifest["sources"] for split in source["splits"].values()
        )
    return Measurement(n_bytes / 1e6 / elapsed_s)


def train(
    corpus: Path, nproc: int, *overrides: str, n_steps: int = 60, n_warm_steps: int = 20, **env: str
) -> Measurement:
    """Train `tiny` and measure it without its first n_warm_steps."""
    settings = [
        f"train.n_steps={n_steps}",
        "optim.schedule.warmup_steps=5",
        "eval.max_documents=1",
        "sample.prompts=[]",
    ]
    settings += [f"data.corpus={corpus}", *overrides]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        sets = [word for setting in settings for word in ("--set", setting)]
        # One thread per rank, so that one rank and two are comparable.
        env = {"OMP_NUM_THREADS": "1", **env}
        turnout("train", "tiny", "--run-dir", str(run_dir), "--nproc", str(nproc), *sets, **env)
        rows = [row for row in read_rows(run_dir) if "train/loss" in row and row["step"] > n_warm_steps]
    speed = statistics.median(row["perf/tokens_per_s"] for row in rows)
    return Measurement(speed, rows[-1]["mem/peak_gib"])


def compare(unit: str, variants: Mapping[str, Measure]) -> list[Row]:
    """Measure all variants in turn, N_ROUNDS times; return the speed of each over the first's."""
    results: dict[str, list[Measurement]] = {name: [] for name in variants}
    for _ in range(N_ROUNDS):
        for name, measure in variants.items():
            results[name].append(measure())
    speeds = {name: [m.speed for m in measured] for name, measured in results.items()}
    first = next(iter(speeds))
    rows = []
    for name, mine in speeds.items():
        note = f"{statistics.median(mine):,.4g} {unit}"
        peaks = [m.peak_gib for m in results[name] if m.peak_gib is not None]
        if peaks:
            note += f", peak of a rank {statistics.median(peaks):.2f} GiB"
        rows.append(Row.of(f"speed of {name} over {first}", over(mine, speeds[first]), note=note))
    return rows


def prepare_rows() -> list[Row]:
    """Return the speed of `turnout prepare` by its workers, tokenizer training included."""
    return compare("MB/s", {f"{n} workers": partial(prepare, n) for n in (1, 2)})


def training_rows() -> list[Row]:
    with small_corpus() as corpus:
        return compare(
            "tokens/s",
            {
                "1 rank, fp32": partial(train, corpus, 1),
                "2 ranks, fp32": partial(train, corpus, 2),
                "2 ranks, fp32, glibc's own malloc settings": partial(train, corpus, 2, **GLIBC_DEFAULTS),
                "2 ranks, bf16": partial(train, corpus, 2, "train.precision=bf16"),
                "2 ranks, fp32, reference experts": partial(
                    train, corpus, 2, "train.expert_backend=reference"
                ),
            },
        )


def busy_rows() -> list[Row]:
    """Measure one rank with a thread per core, alone and with another process that keeps one core busy."""
    few = partial(train, n_steps=16, n_warm_steps=6)
    small = ("train.batch_tokens=512", "train.microbatch_seqs=2", "log.every_steps=2")
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    spinning = {**threads, "GOMP_SPINCOUNT": "300000"}  # libgomp's own
    sleeping = {**threads, "GOMP_SPINCOUNT": "0"}
    rows = []
    with small_corpus() as corpus:
        ways = {
            "threads that spin": partial(few, corpus, 1, *small, **spinning),
            "threads that spin briefly": partial(few, corpus, 1, *small, **threads),
            "threads that sleep": partial(few, corpus, 1, *small, **sleeping),
        }
        rows += compare("tokens/s, quiet", ways)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            try:
                rows += compare("tokens/s, another process beside them", ways)
            finally:
                other.kill()
    return rows


def layout_rows() -> list[Row]:
    layouts: dict[str, tuple[int, tuple[str, ...]]] = {
        "1 rank": (1, ()),
        "2 ranks, DP 2": (2, ()),
        "2 ranks, DP 2, EP 2": (2, ("parallel.ep=2",)),
        "2 ranks, TP 2": (2, ("parallel.tp=2",)),
        "2 ranks, TP 2, sequence parallel": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
        "2 ranks, TP 2, EP 2": (2, ("parallel.tp=2", "parallel.ep=2")),
        "1 rank, selective recomputation": (1, ("train.recompute=selective",)),
        "1 rank, full recomputation": (1, ("train.recompute=full",)),
    }
    with small_corpus() as corpus:
        runs = {name: partial(train, corpus, nproc, *sets) for name, (nproc, sets) in layouts.items()}
        return compare("tokens/s", runs)
