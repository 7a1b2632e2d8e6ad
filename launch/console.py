"""What a person sees of long work: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data.prepare import PrepareProgress
from training.metrics import Row


def format_duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s"


class TrainConsole:
    """One line per logged step: loss, speed and the time left."""

    def __init__(self, n_steps: int, run_dir: Path) -> None:
        self._n_steps, self._run_dir = n_steps, run_dir
        self._start_s, self._first_step = time.monotonic(), 0

    def on_row(self, row: Row) -> None:
        if "eval/bits_per_byte" in row:
            self._say(
                f"held-out  loss {row['eval/loss']:.4f}  bits/byte {row['eval/bits_per_byte']:.4f}  "
                f"({row['eval/n_documents']} documents, {row['eval/n_bytes']:,} bytes)"
            )
            return
        done = int(row["step"])
        left_s = (time.monotonic() - self._start_s) / done * (self._n_steps - done)
        self._say(
            f"step {done:>{len(str(self._n_steps))}}/{self._n_steps}  loss {row['train/loss']:.4f}  "
            f"grad {row['train/grad_norm']:.2f}  lr {row['train/lr']:.2e}  "
            f"{row['perf/tokens_per_s']:,.0f} tokens/s  {row['mem/peak_gib']:.2f} GiB  "
            f"left {format_duration(left_s)}"
        )

    def on_text(self, prompt: str, text: str) -> None:
        self._say(f"--- sample ---\n{prompt}{text}")

    def _say(self, text: str) -> None:
        print(text, flush=True)


class PrepareConsole:
    """Progress of `turnout prepare`, by bytes of text."""

    PLAIN_EVERY_S = 5.0

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout)
        self._stage, self._start_s, self._said_s = "", time.monotonic(), 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def report(self, progress: PrepareProgress) -> None:
        is_new = progress.stage != self._stage
        if is_new:
            self._stage, self._start_s = progress.stage, time.monotonic()
        if self._console.is_terminal:
            self._draw(progress, is_new)
        elif is_new or time.monotonic() - self._said_s > self.PLAIN_EVERY_S:
            self._said_s = time.monotonic()
            print(self._line(progress), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, progress: PrepareProgress) -> str:
        elapsed_s = max(1e-9, time.monotonic() - self._start_s)
        total = f"/{progress.total_bytes / 1e6:.1f}" if progress.total_bytes else ""
        return (
            f"{progress.stage}: {progress.done_bytes / 1e6:.1f}{total} MB, "
            f"{progress.done_documents:,} documents, {progress.done_tokens:,} tokens, "
            f"{progress.done_bytes / 1e6 / elapsed_s:.1f} MB/s"
        )

    def _draw(self, progress: PrepareProgress, is_new: bool) -> None:
        if self._bar is None:
            columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
        if is_new or self._task is None:
            self._task = self._bar.add_task(self._line(progress), total=progress.total_bytes)
        self._bar.update(self._task, completed=progress.done_bytes, description=self._line(progress))
