"""What a command prints for people: progress while it works, tables, and durations and sizes in words.

A terminal gets a live bar; files and pipes get plain lines. Nothing here decides what is worth reporting.
"""

import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from turnout.training.metrics import Row

if TYPE_CHECKING:
    from turnout.data.prepare import PrepareProgress  # it would import the readers of all kinds of text

UNFOLDED_COLUMNS = 100_000


def print_table(table: Table) -> None:
    """Print a table. Lines are folded to the width of a terminal, and never in a file or pipe."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = UNFOLDED_COLUMNS
    console.print(table)


def format_duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s"


def format_size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


class LiveBar:
    """A progress bar if stdout is a terminal; otherwise nothing but the printed lines."""

    def __init__(self, title: str, total: float | None) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self.is_live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(title, total=total)
        if self.is_live:
            self._progress.start()

    def update(self, done: float, title: str | None = None) -> None:
        self._progress.update(self._task, completed=done, description=title)

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        if self.is_live:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.is_live:  # elsewhere it would print an empty line
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class TrainConsole:
    """Progress of `turnout train`: one line per logged step with loss, speed and the time left, and a bar."""

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._bar = LiveBar("training", n_steps)

    def on_row(self, row: Row) -> None:
        if "train/loss" in row:
            self._print_step(row)
        if "eval/bits_per_byte" in row:
            self._bar.print_line(
                f"held-out  loss {row['eval/loss']:.4f}  bits/byte {row['eval/bits_per_byte']:.4f}  "
                f"({row['eval/n_documents']} documents, {row['eval/n_bytes']:,} bytes)"
            )

    def _print_step(self, row: Row) -> None:
        done = int(row["step"])
        self._bar.update(done, f"step {done}/{self._n_steps}")
        step_s = row["perf/step_ms"] / 1000
        left_s = step_s * (self._n_steps - done)
        self._bar.print_line(
            f"step {done:>{len(str(self._n_steps))}}/{self._n_steps}  loss {row['train/loss']:.4f}  "
            f"grad {row['train/grad_norm']:.2f}  lr {row['train/lr']:.2e}  "
            f"{row['perf/tokens_per_s']:,.0f} tokens/s  {row['mem/peak_gib']:.2f} GiB  "
            f"left {format_duration(left_s)}"
        )

    def on_event(self, event: str) -> None:
        self._bar.print_line(event)

    def on_text(self, prompt: str, text: str) -> None:
        self._bar.close()
        self._bar.print_line(f"--- sample ---\n{prompt}{text}")

    def close(self) -> None:
        self._bar.close()


class PrepareConsole:
    """Progress of `turnout prepare`, in bytes of text."""

    PLAIN_EVERY_S = 5.0

    def __init__(self) -> None:
        self._stage, self._start_s, self._printed_s = "", time.monotonic(), 0.0
        self._bar: LiveBar | None = None

    def report(self, progress: "PrepareProgress") -> None:
        now_s = time.monotonic()
        is_new = progress.stage != self._stage
        if is_new:
            self.close()
            self._stage, self._start_s = progress.stage, now_s
            self._bar = LiveBar(progress.stage, progress.total_bytes)
        assert self._bar is not None
        self._bar.update(progress.done_bytes, self._line(progress))
        if not self._bar.is_live and (is_new or now_s - self._printed_s > self.PLAIN_EVERY_S):
            self._printed_s = now_s
            self._bar.print_line(self._line(progress))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, progress: "PrepareProgress") -> str:
        elapsed_s = max(1e-3, time.monotonic() - self._start_s)
        total = f"/{progress.total_bytes / 1e6:.1f}" if progress.total_bytes else ""
        speed = f", {progress.done_bytes / 1e6 / elapsed_s:.1f} MB/s" if elapsed_s > 1 else ""
        return (
            f"{progress.stage}: {progress.done_bytes / 1e6:.1f}{total} MB, "
            f"{progress.done_documents:,} documents, {progress.done_tokens:,} tokens{speed}"
        )
