"""`turnout status`: show where a run stands, from its directory and from SLURM's queue. Changes nothing."""

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
from turnout.launch.verify import verify_with_bar
from turnout.training.checkpoint.directory import newest_readable, step_of
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.metrics import Row
from turnout.training.renames import METRICS, rename_keys


def show_status(run_dir: Path | None, *, is_verified: bool) -> None:
    """Print where one run stands, or one line for each run that this user has in the queue.

    Raises ConfigError where run_dir holds no run.
    """
    if run_dir is None:
        show_queue()
        return
    if not has_run(run_dir):
        raise ConfigError(f"{run_dir}: there is no run; name the directory that --run-dir named")
    for name, value in status_lines(run_dir, is_verified=is_verified):
        print(f"{name:12} {value}")


def show_queue() -> None:
    """Print one line for each run that this user has in the queue."""
    jobs = [job for job in queued_jobs("--me") if (Path(job.directory) / SUBMISSIONS).is_dir()]
    for job in jobs:
        row = newest_row(Path(job.directory))
        step = f"step {row['step']}" if row else "no step yet"
        print(f"{job.job_id:8} {describe_job(job):40} {step:16} {job.directory}")
    if not jobs:
        print("none of your jobs trains or waits; turnout status RUN_DIR shows one run")


def status_lines(run_dir: Path, *, is_verified: bool) -> Iterator[tuple[str, str]]:
    """Yield the rows to print, each a (name, value) pair."""
    attempts, n_steps = read_attempts(run_dir), read_config(run_dir).train.n_steps
    yield "run", str(run_dir)
    yield from queue_lines(run_dir)
    if attempts:
        yield "attempt", describe_attempts(attempts)
    row = newest_row(run_dir)
    if row is None:
        yield "step", f"none of {n_steps:,} logged yet"
    else:
        yield "step", describe_progress(row, n_steps, attempts)
        loss = row["train/loss"]
        yield "loss", "not finite" if loss is None else f"{loss:.4f}"
        yield "speed", f"{row['perf/tokens_per_s']:,.0f} tokens/s, MFU {row['perf/mfu_frac']:.1%}"
    yield "checkpoint", describe_checkpoint(run_dir, is_verified=is_verified)
    if (failed := last_failure(attempts)) is not None:
        assert failed.ending is not None
        yield "failure", f"{failed.directory.name}: {'; '.join(failed.ending.reasons)}"


def describe_progress(row: Row, n_steps: int, attempts: list[AttemptRecord]) -> str:
    """Describe the newest row's step, with an estimate of the time left to train while steps are left."""
    progress = f"{row['step']:,} of {n_steps:,}"
    left_s = row["perf/step_ms"] / 1000 * (n_steps - row["step"])
    if left_s > 0:
        return f"{progress}, {format_duration(left_s)} of training left"
    # After the last step a run still evaluates and saves.
    is_done = bool(attempts) and attempts[-1].ending is not None and attempts[-1].ending.kind == "done"
    return f"{progress}, finished" if is_done else progress


def queue_lines(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Yield a row for each job of the run in the queue; none for a run that was never submitted."""
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
        yield "job", f"{job.job_id} {describe_job(job)}"
    if not jobs:
        yield "job", "none in the queue"


def describe_job(job: QueuedJob) -> str:
    """Describe a job's state, with the nodes and the time that a running one has left."""
    if job.state == "PENDING":
        return f"waiting ({job.reason})"
    return f"{job.state.lower()} on {job.nodes}, {job.time_left} left"


def describe_attempts(attempts: list[AttemptRecord]) -> str:
    """Describe how many attempts there were, and how the newest one stands or ended."""
    newest = attempts[-1]
    where = f"{len(attempts)}, {newest.begin.n_ranks} ranks on {', '.join(newest.begin.nodes)}"
    if newest.ending is None:
        ago = format_duration(time.time() - newest.begin.began_s)
        return f"{where}, {_describe_process(newest)}, began {ago} ago at step {newest.begin.from_step}"
    end = newest.ending
    kind = "ended by SLURM or a signal" if end.kind == "told" else f"ended ({end.kind})"
    return f"{where}, {kind}: {end.decision or f'exit code {end.code}'}"


def _describe_process(newest: AttemptRecord) -> str:
    begin = newest.begin
    if begin.job_id or begin.nodes != (os.uname().nodename,):
        return "not recorded as ended"
    return "running" if Path(f"/proc/{begin.pid}").exists() else "ended without a record"


def newest_row(run_dir: Path) -> Row | None:
    """Return the last complete row of metrics.jsonl that has a loss."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            row = rename_keys(json.loads(line), METRICS)
        except ValueError:  # the last line, while it is being written
            continue
        if "train/loss" in row:
            return row
    return None


def describe_checkpoint(run_dir: Path, *, is_verified: bool) -> str:
    """Describe the newest checkpoint's step and size, and whether its files are intact."""
    try:
        newest = newest_readable(run_dir)
        if newest is None:
            return "none yet"
        path, manifest = newest
        words = f"step {step_of(path):,}, {manifest.n_bytes / 2**30:.2f} GiB"
        if not is_verified:
            return f"{words}, all files are present (--verify reads them)"
        verify_with_bar(path)
        return f"{words}, verified: every byte is as it was written"
    except CheckpointError as err:
        return f"damaged: {err}"


def last_failure(attempts: list[AttemptRecord]) -> AttemptRecord | None:
    """Return the newest attempt whose ending gives a reason."""
    return next((a for a in reversed(attempts) if a.ending is not None and a.ending.reasons), None)
