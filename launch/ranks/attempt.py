"""The start of a run's ranks: claim the run directory, launch, and say how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turnout.data.corpus import Corpus
from turnout.launch.ranks.attempt_records import Ending, conclude, ending
from turnout.launch.ranks.launcher import Ended
from turnout.launch.run_dir import data_identity, identity_of, read_config, resume_run_dir
from turnout.launch.verify import verified
from turnout.training.checkpoint.directory import newest_readable
from turnout.training.checkpoint.manifest import Manifest
from turnout.training.checkpoint.resume_check import check_same_data, check_same_run
from turnout.training.config.run import RunConfig
from turnout.training.errors import CheckpointError, TakenOverError
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import FencingToken, take_over


@dataclass(frozen=True)
class Attempt:
    """A start of a run that owns its directory: nothing is left to do but to start the ranks."""

    run_dir: Path
    attempt_dir: Path
    layout: Layout
    fencing_token: FencingToken


def claim(run_dir: Path, attempt_dir: Path, layout: Layout) -> Attempt:
    """Make a start the owner of its run."""
    fencing_token = FencingToken(run_dir, take_over(run_dir))
    fencing_token.hand_over(attempt_dir)
    return Attempt(run_dir, attempt_dir, layout, fencing_token)


def supervise(start: Attempt, launch: Callable[[], Ended]) -> Ending:
    """Launch the ranks, and return how the start ended."""
    try:
        return conclude(start.run_dir, start.attempt_dir, start.layout, launch())
    except TakenOverError as err:
        return ending("overtaken", start.run_dir, [str(err)])


def nothing_left(run_dir: Path, cfg: RunConfig) -> str:
    return f"nothing left to do: {run_dir} has all {cfg.train.n_steps} steps of train.n_steps"


def resume_run(
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
    resume_run_dir(run_dir, cfg, corpus, nproc=nproc)
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
