"""`turnout train`: check everything, make or take up the run directory, start the ranks."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.corpus import Corpus
from launch.checkpoints import verified
from launch.duration import format_duration
from launch.exit_codes import DONE
from launch.failures import explain_failures
from launch.local import launch_ranks
from launch.plan import data_line, plan_lines
from launch.preflight import check_corpus, check_machine
from launch.run_dir import create_run_dir, data_identity, has_run, identity_of, read_config, take_up_run_dir
from launch.settings import check_setting_paths, load_config
from training.checkpoint_dir import newest_readable
from training.checkpoint_manifest import Manifest
from training.config import RunConfig
from training.errors import CheckpointError
from training.owner import take_over
from training.parallel import plan_layout
from training.resume import check_same_data, check_same_run


def plan_run(recipe: str, overrides: Sequence[str], *, nproc: int) -> None:
    """Print what the run needs. The model's rows come first, so that they are there even if the corpus is
    not.
    """
    cfg = load_config(recipe, overrides)
    for quantity, value in plan_lines(cfg, plan_layout(cfg, nproc)):
        print(f"{quantity:18} {value}")
    quantity, value = data_line(cfg, check_corpus(cfg))
    print(f"{quantity:18} {value}")


def start_run(
    recipe: str,
    overrides: Sequence[str],
    *,
    run_dir: Path,
    nproc: int,
    is_resumed: bool = False,
    allowed_changes: Sequence[str] = (),
) -> int:
    """Train, and return the exit code of the run.

    is_resumed: go on with the run in run_dir where there is one.
    """
    check_setting_paths("--allow-change", allowed_changes)
    cfg = load_config(recipe, overrides)
    layout = plan_layout(cfg, nproc)
    check_machine(cfg, nproc)
    corpus = check_corpus(cfg)
    if is_resumed and has_run(run_dir):
        newest = take_up(run_dir, cfg, corpus, nproc=nproc, allowed_changes=allowed_changes)
        if newest is not None and is_finished(*newest, cfg):
            print(f"nothing left to do: {run_dir} has all {cfg.train.n_steps} steps of train.n_steps")
            return DONE
    else:
        create_run_dir(run_dir, cfg, corpus, nproc=nproc)
    token = take_over(run_dir)
    print(f"run directory {run_dir}, corpus {corpus.manifest.corpus_hash[:12]}, {nproc} ranks", flush=True)
    start_s = time.monotonic()
    ended = launch_ranks(run_dir, nproc, token=token)
    if ended.is_done:
        duration = format_duration(time.monotonic() - start_s)
        print(f"done in {duration}: {run_dir} (to look at it: tensorboard --logdir {run_dir})")
        return DONE
    code, reasons = explain_failures(ended.start_dir, layout, ended.stuck)
    for reason in reasons:
        print(f"turnout: {reason}", file=sys.stderr)
    print(f"turnout: the run ended early, exit code {code}; logs in {run_dir / 'logs'}", file=sys.stderr)
    return code


def take_up(
    run_dir: Path, cfg: RunConfig, corpus: Corpus, *, nproc: int, allowed_changes: Sequence[str]
) -> tuple[Path, Manifest] | None:
    """Prepare a run directory for going on, and return its newest readable checkpoint, if it has one.

    Raises ConfigError where the settings or the text are not the run's, CheckpointError where it has
    checkpoints and none can be read. Each byte of the one that is used is verified by the ranks.
    """
    saved_cfg, saved_data = read_config(run_dir), data_identity(run_dir)
    newest = newest_readable(run_dir)
    if newest is not None:
        saved_cfg, saved_data = read_config(newest[0]), newest[1].data
    changes = check_same_run(saved_cfg, cfg, allowed_changes)
    changes += check_same_data(saved_data, identity_of(corpus), allowed_changes)
    take_up_run_dir(run_dir, cfg, corpus, nproc=nproc)
    for change in changes:
        print(f"changed, as allowed: {change}")
    if newest is None:
        print(f"{run_dir} has no checkpoint yet: starting again from the first step")
    return newest


def is_finished(path: Path, manifest: Manifest, cfg: RunConfig) -> bool:
    """Return whether a checkpoint is the run's last, and intact; the ranks go back behind a damaged one."""
    if manifest.state.step < cfg.train.n_steps:
        return False
    try:
        verified(path)
    except CheckpointError:
        return False
    return True
