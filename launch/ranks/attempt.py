"""One attempt at a run, whoever starts its ranks: prepare the run directory, claim it, supervise the ranks.

`turnout train` (launch/commands/train.py) and a SLURM job (launch/slurm/job.py) both follow these steps;
each brings its own way to launch the ranks. What an attempt leaves on disk is in attempt_records.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turnout.data.corpus import Corpus
from turnout.launch.ranks.attempt_records import Ending, conclude, ending
from turnout.launch.ranks.launcher import RanksOutcome
from turnout.launch.run_dir import data_identity, identity_of, read_config, resume_run_dir
from turnout.launch.verify import verify_with_bar
from turnout.training.checkpoint.directory import newest_readable
from turnout.training.checkpoint.manifest import Manifest
from turnout.training.checkpoint.resume_check import check_same_data, check_same_run
from turnout.training.config.run import RunConfig
from turnout.training.errors import CheckpointError, TakenOverError
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import FencingToken, take_over


def resume_run(
    run_dir: Path, cfg: RunConfig, corpus: Corpus, *, nproc: int, allowed_changes: Sequence[str]
) -> tuple[Path, Manifest] | None:
    """Prepare a run directory for resuming; return its newest readable checkpoint, None if it has none yet.

    Raises ConfigError if the settings or the corpus are not those of the run, CheckpointError if the run has
    checkpoints and none can be read. The bytes of the checkpoint are not verified here: the ranks do that.
    """
    saved_cfg, saved_data = read_config(run_dir), data_identity(run_dir)
    newest = newest_readable(run_dir)
    if newest is not None:
        saved_cfg, saved_data = read_config(newest[0]), newest[1].data
    changes = check_same_run(saved_cfg, cfg, allowed_changes)
    changes += check_same_data(saved_data, identity_of(corpus), allowed_changes)
    resume_run_dir(run_dir, cfg, corpus, nproc=nproc)
    for change in changes:
        print(f"changed, as allowed: {change}")
    if newest is None:
        print(f"{run_dir} has no checkpoint yet: starting again from the first step")
    return newest


def is_finished(path: Path, manifest: Manifest, cfg: RunConfig) -> bool:
    """Return whether a checkpoint is the run's last one and intact.

    If it is damaged, the run is not finished: the ranks resume from an older one.
    """
    if manifest.state.step < cfg.train.n_steps:
        return False
    try:
        verify_with_bar(path)
    except CheckpointError:
        return False
    return True


def nothing_left(run_dir: Path, cfg: RunConfig) -> str:
    return f"nothing left to do: {run_dir} has all {cfg.train.n_steps} steps of train.n_steps"


@dataclass(frozen=True)
class Attempt:
    """An attempt that has claimed its run directory, so its ranks may start."""

    run_dir: Path
    attempt_dir: Path
    layout: Layout
    fencing_token: FencingToken


def claim(run_dir: Path, attempt_dir: Path, layout: Layout) -> Attempt:
    """Make this attempt the only one that may write to the run directory."""
    fencing_token = FencingToken(run_dir, take_over(run_dir))
    fencing_token.hand_over(attempt_dir)
    return Attempt(run_dir, attempt_dir, layout, fencing_token)


def supervise(attempt: Attempt, launch: Callable[[], RanksOutcome]) -> Ending:
    """Launch the ranks, wait for them, and return how the attempt ended."""
    try:
        return conclude(attempt.run_dir, attempt.attempt_dir, attempt.layout, launch())
    except TakenOverError as err:
        return ending("overtaken", attempt.run_dir, [str(err)])
