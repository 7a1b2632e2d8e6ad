"""`make bench`: speed and memory, each as a ratio to a baseline of the same interleaved run."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.local import CPU_ALLOCATOR
from tests.bench.checkpoints import print_checkpoint_cost
from tests.bench.generate import print_generation_speed
from tests.bench.self_check import print_self_check_cost
from tests.runs import read_rows

N_ROUNDS = 3
GLIBC_DEFAULTS = {
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024),
    "MALLOC_TOP_PAD_": str(128 * 1024),
    "THP_MEM_ALLOC_ENABLE": "0",
}


@dataclass(frozen=True)
class Measurement:
    speed: float  # in the unit of its table
    peak_gib: float


@dataclass(frozen=True)
class Variant:
    name: str
    measure: Callable[[], Measurement]


def turnout(*arguments: str, **env: str) -> None:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    subprocess.run(command, env={**os.environ, **env}, check=True, stdout=subprocess.DEVNULL, timeout=600)


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
    return Measurement(n_bytes / 1e6 / elapsed_s, float("nan"))


def train(corpus: Path, nproc: int, *overrides: str, **env: str) -> Measurement:
    """Train `tiny` for 60 steps; the first 20 warm up and are left out."""
    settings = [
        "train.n_steps=60",
        "optim.schedule.warmup_steps=5",
        "eval.max_documents=1",
        "sample.prompts=[]",
    ]
    settings += [f"data.corpus={corpus}", *overrides]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        sets = [word for setting in settings for word in ("--set", setting)]
        # One thread per rank, so that one rank against two compares like with like.
        env = {"OMP_NUM_THREADS": "1", **env}
        turnout("train", "tiny", "--run-dir", str(run_dir), "--nproc", str(nproc), *sets, **env)
        rows = [row for row in read_rows(run_dir) if "train/loss" in row and row["step"] > 20]
    speed = statistics.median(row["perf/tokens_per_s"] for row in rows)
    return Measurement(speed, rows[-1]["mem/peak_gib"])


def compare(title: str, unit: str, variants: list[Variant]) -> None:
    """Measure all variants N_ROUNDS times in turn and print medians with their spread."""
    results: dict[str, list[Measurement]] = {variant.name: [] for variant in variants}
    for _ in range(N_ROUNDS):
        for variant in variants:
            results[variant.name].append(variant.measure())
    baseline = [m.speed for m in results[variants[0].name]]
    print(f"\n### {title}\n\n| variant | {unit} | spread | ratio to the first | peak GiB per rank |")
    print("|---|---|---|---|---|")
    for name, measured in results.items():
        speeds = [m.speed for m in measured]
        # Each round's ratio is within that round, so that a slower machine in between cancels out.
        ratio = statistics.median(speed / base for speed, base in zip(speeds, baseline, strict=True))
        spread = f"{min(speeds):,.4g} to {max(speeds):,.4g}"
        peak = statistics.median(m.peak_gib for m in measured)
        print(
            f"| {name} | {statistics.median(speeds):,.4g} | {spread} | {ratio:.2f} | {peak:.2f} |", flush=True
        )


def compare_prepare() -> None:
    compare(
        "turnout prepare --embedded --vocab-size 4096, tokenizer training included",
        "MB/s",
        [Variant(f"{n} workers", lambda n=n: prepare(n)) for n in (1, 2)],
    )


def compare_training(corpus: Path) -> None:
    compare(
        "turnout train tiny, one thread per rank",
        "tokens/s",
        [
            Variant("1 rank, fp32", lambda: train(corpus, 1)),
            Variant("2 ranks, fp32", lambda: train(corpus, 2)),
            Variant("2 ranks, fp32, glibc's own malloc settings", lambda: train(corpus, 2, **GLIBC_DEFAULTS)),
            Variant("2 ranks, bf16", lambda: train(corpus, 2, "train.precision=bf16")),
            Variant(
                "2 ranks, fp32, reference experts",
                lambda: train(corpus, 2, "train.expert_backend=reference"),
            ),
        ],
    )


def compare_layouts(corpus: Path) -> None:
    layouts = {
        "1 rank": (1, ()),
        "2 ranks, DP 2": (2, ()),
        "2 ranks, DP 2, EP 2": (2, ("parallel.ep=2",)),
        "2 ranks, TP 2": (2, ("parallel.tp=2",)),
        "2 ranks, TP 2, sequence parallel": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
        "2 ranks, TP 2, EP 2": (2, ("parallel.tp=2", "parallel.ep=2")),
        "1 rank, selective recomputation": (1, ("train.recompute=selective",)),
        "1 rank, full recomputation": (1, ("train.recompute=full",)),
    }
    compare(
        "turnout train tiny, fp32, one thread per rank, by layout",
        "tokens/s",
        [
            Variant(name, lambda nproc=nproc, sets=sets: train(corpus, nproc, *sets))
            for name, (nproc, sets) in layouts.items()
        ],
    )


def run_alone(module: str) -> None:
    """Run a benchmark in a process of its own, with the memory allocator set as the launcher sets it."""
    subprocess.run(
        [sys.executable, "-m", module], env={**os.environ, **CPU_ALLOCATOR}, check=True, timeout=1800
    )


def with_corpus(measure: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        turnout("prepare", "--embedded", "--vocab-size", "4096", "--out", str(corpus))
        measure(corpus)


BENCHMARKS: dict[str, Callable[[], None]] = {
    "prepare": compare_prepare,
    "training": lambda: with_corpus(compare_training),
    "layouts": lambda: with_corpus(compare_layouts),
    "self-check": print_self_check_cost,
    "checkpoints": print_checkpoint_cost,
    "generate": print_generation_speed,
    "experts": lambda: run_alone("tests.bench.experts"),
    "loss": lambda: run_alone("tests.bench.loss"),
    "step": lambda: run_alone("tests.bench.step"),
    "engine": lambda: run_alone("tests.bench.engine"),
}


def main() -> None:
    """Run the benchmarks named on the command line, or all of them."""
    for name in sys.argv[1:] or BENCHMARKS:
        if name not in BENCHMARKS:
            sys.exit(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
