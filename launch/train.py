"""`turnout train`: check everything, make or take up the run directory, start the ranks."""

import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.corpus import Corpus
from launch.checkpoints import verified
from launch.duration import format_duration
from launch.exit_codes import DONE
from launch.hostfile import Hosts, launch_on_hosts
from launch.local import Ended, launch_ranks, this_machine
from launch.preflight import check_corpus, check_machine
from launch.run_dir import create_run_dir, data_identity, has_run, identity_of, read_config, take_up_run_dir
from launch.settings import check_setting_paths
from launch.start_dir import make_start_dir
from launch.starts import Ending, begin_here, conclude, ending, newest_step, write_begin, write_ending
from training.checkpoint_dir import newest_readable
from training.checkpoint_manifest import Manifest
from training.config import RunConfig
from training.errors import CheckpointError, TakenOverError
from training.layout import Layout, plan_layout
from training.owner import Owner, take_over
from training.resume import check_same_data, check_same_run


@dataclass(frozen=True)
class Start:
    """A start of a run that owns its directory: nothing is left to do but to start the ranks."""

    run_dir: Path
    start_dir: Path
    layout: Layout
    owner: Owner


def start_run(
    cfg: RunConfig,
    *,
    run_dir: Path,
    nproc: int,
    is_resumed: bool = False,
    allowed_changes: Sequence[str] = (),
    hosts: Hosts | None = None,
) -> int:
    """Train, and return the exit code of the run.

    nproc: ranks on this machine, or on each of the hosts. is_resumed: go on with the run in run_dir where
    there is one.
    """
    check_setting_paths("--allow-change", allowed_changes)
    n_ranks = nproc * (len(hosts.names) if hosts else 1)
    layout = plan_layout(cfg, n_ranks)
    check_machine(cfg, nproc)
    corpus = check_corpus(cfg)
    if is_resumed and has_run(run_dir):
        newest = take_up(run_dir, cfg, corpus, nproc=n_ranks, allowed_changes=allowed_changes)
        if newest is not None and is_finished(*newest, cfg):
            print(nothing_left(run_dir, cfg))
            return DONE
    else:
        create_run_dir(run_dir, cfg, corpus, nproc=n_ranks)
    start = claim(run_dir, make_start_dir(run_dir / "logs"), layout)
    nodes = hosts.names if hosts else [socket.gethostname()]
    write_begin(start.start_dir, begin_here(n_ranks, newest_step(run_dir), nodes))
    print(f"run directory {run_dir}, corpus {corpus.manifest.corpus_hash[:12]}, {n_ranks} ranks", flush=True)
    began_s = time.monotonic()

    def launch() -> Ended:
        if hosts is not None:
            return launch_on_hosts(start.run_dir, start.start_dir, hosts, owner=start.owner)
        return launch_ranks(start.run_dir, start.start_dir, this_machine(nproc), owner=start.owner)

    try:
        end = see_through(start, launch)
    except KeyboardInterrupt:
        write_ending(start.start_dir, ending("failed", run_dir, ["interrupted"]))
        raise
    write_ending(start.start_dir, end)
    tell(end, run_dir, time.monotonic() - began_s)
    return end.code


def claim(run_dir: Path, start_dir: Path, layout: Layout) -> Start:
    """Make a start the owner of its run."""
    owner = Owner(run_dir, take_over(run_dir))
    owner.hand_to(start_dir)
    return Start(run_dir, start_dir, layout, owner)


def see_through(start: Start, launch: Callable[[], Ended]) -> Ending:
    """Launch the ranks, and return how the start ended."""
    try:
        return conclude(start.run_dir, start.start_dir, start.layout, launch())
    except TakenOverError as err:
        return ending("overtaken", start.run_dir, [str(err)])


def tell(end: Ending, run_dir: Path, elapsed_s: float) -> None:
    """Say how a start ended: on stdout where nothing went wrong."""
    if end.kind == "done":
        duration = format_duration(elapsed_s)
        print(f"done in {duration}: {run_dir} (to look at it: tensorboard --logdir {run_dir})", flush=True)
        return
    if end.kind == "saved":
        print(f"saved after step {end.saved_step}; --resume goes on, exit code {end.code}", flush=True)
        return
    for reason in end.reasons:
        print(f"turnout: {reason}", file=sys.stderr)
    print(f"turnout: the run ended early, exit code {end.code}; logs in {run_dir / 'logs'}", file=sys.stderr)


def nothing_left(run_dir: Path, cfg: RunConfig) -> str:
    return f"nothing left to do: {run_dir} has all {cfg.train.n_steps} steps of train.n_steps"


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
