"""`turnout train`: check everything, make the run directory, start the ranks."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.duration import format_duration
from launch.exit_codes import DONE
from launch.failures import explain_failures
from launch.local import launch_ranks
from launch.plan import data_line, plan_lines
from launch.preflight import check_corpus, check_machine
from launch.run_dir import create_run_dir
from launch.settings import load_config
from training.parallel import plan_layout


def plan_run(recipe: str, overrides: Sequence[str], *, nproc: int) -> None:
    """Print what the run needs. The model's rows come first, so that they are there even if the corpus is
    not.
    """
    cfg = load_config(recipe, overrides)
    for quantity, value in plan_lines(cfg, plan_layout(cfg, nproc)):
        print(f"{quantity:18} {value}")
    quantity, value = data_line(cfg, check_corpus(cfg))
    print(f"{quantity:18} {value}")


def start_run(recipe: str, overrides: Sequence[str], *, run_dir: Path, nproc: int) -> int:
    """Train, and return the exit code of the run."""
    cfg = load_config(recipe, overrides)
    layout = plan_layout(cfg, nproc)
    check_machine(cfg, nproc)
    corpus = check_corpus(cfg)
    create_run_dir(run_dir, cfg, corpus, nproc=nproc)
    print(f"run directory {run_dir}, corpus {corpus.manifest.corpus_hash[:12]}, {nproc} ranks", flush=True)
    start_s = time.monotonic()
    is_done, stuck = launch_ranks(run_dir, nproc)
    if is_done:
        duration = format_duration(time.monotonic() - start_s)
        print(f"done in {duration}: {run_dir} (to look at it: tensorboard --logdir {run_dir})")
        return DONE
    code, reasons = explain_failures(run_dir / "logs", layout, stuck)
    for reason in reasons:
        print(f"turnout: {reason}", file=sys.stderr)
    print(f"turnout: the run ended early, exit code {code}; logs in {run_dir / 'logs'}", file=sys.stderr)
    return code
