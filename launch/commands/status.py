"""`turnout status`: where a run stands, from its directory and from the queue; it changes nothing."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from turnout.launch.console import format_duration
from turnout.launch.ranks.attempt_records import AttemptRecord, read_attempts
from turnout.launch.run_dir import SUBMISSIONS, has_run, read_config
from turnout.launch.slurm.client import QueuedJob, SlurmError, jobs_of, queued_jobs
from turnout.launch.verify import verified
from turnout.training.checkpoint.directory import newest_readable, step_of
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.metrics import Row
from turnout.training.renames import METRICS, rename_keys


def show_status(run_dir: Path | None, *, is_verified: bool) -> None:
    """Print where one run stands, or one line for each run of this user in the queue."""
    if run_dir is None:
        show_queue()
        return
    if not has_run(run_dir):
        raise ConfigError(f"{run_dir}: there is no run; name what --run-dir named")
    for name, value in status_lines(run_dir, is_verified=is_verified):
        print(f"{name:12} {value}")


def show_queue() -> None:
    jobs = [job for job in queued_jobs("--me") if (Path(job.directory) / SUBMISSIONS).is_dir()]
    for job in jobs:
        row = newest_row(Path(job.directory))
        step = f"step {row['step']}" if row else "no step yet"
        print(f"{job.job_id:8} {job_words(job):40} {step:16} {job.directory}")
    if not jobs:
        print("no job of yours trains or waits; turnout status RUN_DIR shows one run")


def status_lines(run_dir: Path, *, is_verified: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, value) rows."""
    starts, n_steps = read_attempts(run_dir), read_config(run_dir).train.n_steps
    yield "run", str(run_dir)
    yield from queue_lines(run_dir)
    if starts:
        yield "start", start_words(starts)
    row = newest_row(run_dir)
    if row is None:
        yield "step", f"none of {n_steps:,} logged yet"
    else:
        left_s = row["perf/step_ms"] / 1000 * (n_steps - row["step"])
        yield "step", f"{row['step']:,} of {n_steps:,}, {format_duration(left_s)} to go while it trains"
        loss = row["train/loss"]
        yield "loss", "not finite" if loss is None else f"{loss:.4f}"
        yield "speed", f"{row['perf/tokens_per_s']:,.0f} tokens/s, MFU {row['perf/mfu_frac']:.1%}"
    yield "checkpoint", checkpoint_words(run_dir, is_verified=is_verified)
    if (failed := last_failure(starts)) is not None:
        assert failed.ending is not None
        yield "failure", f"{failed.directory.name}: {'; '.join(failed.ending.reasons)}"


def queue_lines(run_dir: Path) -> Iterator[tuple[str, str]]:
    if not (run_dir / SUBMISSIONS).is_dir():
        return
    if shutil.which("squeue") is None:
        yield "job", "unknown here: squeue is not installed"
        return
    try:
        jobs = jobs_of(run_dir)
    except SlurmError as err:
        yield "job", f"unknown: {err}"
        return
    for job in jobs:
        yield "job", f"{job.job_id} {job_words(job)}"
    if not jobs:
        yield "job", "none in the queue"


def job_words(job: QueuedJob) -> str:
    if job.state == "PENDING":
        return f"waiting ({job.reason})"
    return f"{job.state.lower()} on {job.nodes}, {job.time_left} left"


def start_words(starts: list[AttemptRecord]) -> str:
    """Say which start is or was the last, and how it goes or ended."""
    newest = starts[-1]
    where = f"{len(starts)}, {newest.begin.n_ranks} ranks on {', '.join(newest.begin.nodes)}"
    if newest.ending is None:
        ago = format_duration(time.time() - newest.begin.began_s)
        return f"{where}, {_is_alive_words(newest)}, begun {ago} ago at step {newest.begin.from_step}"
    end = newest.ending
    return f"{where}, ended ({end.kind}): {end.decision or f'exit code {end.code}'}"


def _is_alive_words(newest: AttemptRecord) -> str:
    begin = newest.begin
    if begin.job_id or begin.nodes != (os.uname().nodename,):
        return "no ending known"
    return "under way" if Path(f"/proc/{begin.pid}").exists() else "ended without a word"


def newest_row(run_dir: Path) -> Row | None:
    """Return the last whole row of the metrics that has a loss."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            row = rename_keys(json.loads(line), METRICS)
        except ValueError:  # it is being written
            continue
        if "train/loss" in row:
            return row
    return None


def checkpoint_words(run_dir: Path, *, is_verified: bool) -> str:
    try:
        newest = newest_readable(run_dir)
        if newest is None:
            return "none yet"
        path, manifest = newest
        words = f"step {step_of(path):,}, {manifest.n_bytes / 2**30:.2f} GiB"
        if not is_verified:
            return f"{words}, all files are there (--verify reads them)"
        verified(path)
        return f"{words}, verified: every byte is as it was written"
    except CheckpointError as err:
        return f"damaged: {err}"


def last_failure(starts: list[AttemptRecord]) -> AttemptRecord | None:
    return next((s for s in reversed(starts) if s.ending is not None and s.ending.reasons), None)
