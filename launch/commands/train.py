"""`turnout train`: check everything, create or resume the run directory, launch the ranks."""

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from turnout.launch.console import format_duration
from turnout.launch.exit_codes import DONE
from turnout.launch.preflight import check_corpus, check_machine
from turnout.launch.ranks.attempt import claim, is_finished, nothing_left, resume_run, supervise
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.attempt_records import (
    Ending,
    begin_here,
    ending,
    newest_step,
    write_begin,
    write_ending,
)
from turnout.launch.ranks.hostfile import Hosts, check_hosts, launch_on_hosts
from turnout.launch.ranks.launcher import RanksOutcome, launch_ranks, this_machine
from turnout.launch.run_dir import create_run_dir, has_run
from turnout.launch.settings import check_setting_paths
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import plan_layout


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

    nproc: ranks on this machine, or on each of the hosts. is_resumed: resume the run in run_dir if there is
    one.
    """
    check_setting_paths("--allow-change", allowed_changes)
    n_ranks = nproc * (len(hosts.names) if hosts else 1)
    layout = plan_layout(cfg, n_ranks)
    check_machine(cfg, nproc)
    if hosts is not None:
        check_hosts(hosts, run_dir)
    corpus = check_corpus(cfg)
    if is_resumed and has_run(run_dir):
        newest = resume_run(run_dir, cfg, corpus, nproc=n_ranks, allowed_changes=allowed_changes)
        if newest is not None and is_finished(*newest, cfg):
            print(nothing_left(run_dir, cfg))
            return DONE
    else:
        create_run_dir(run_dir, cfg, corpus, nproc=n_ranks)
    attempt = claim(run_dir, make_attempt_dir(run_dir / "logs"), layout)
    nodes = hosts.names if hosts else [socket.gethostname()]
    write_begin(attempt.attempt_dir, begin_here(n_ranks, newest_step(run_dir), nodes))
    print(f"run directory {run_dir}, corpus {corpus.manifest.corpus_hash[:12]}, {n_ranks} ranks", flush=True)
    began_s = time.monotonic()

    def launch() -> RanksOutcome:
        if hosts is not None:
            return launch_on_hosts(
                attempt.run_dir, attempt.attempt_dir, hosts, fencing_token=attempt.fencing_token
            )
        return launch_ranks(
            attempt.run_dir, attempt.attempt_dir, this_machine(nproc), fencing_token=attempt.fencing_token
        )

    try:
        end = supervise(attempt, launch)
    except KeyboardInterrupt:
        write_ending(attempt.attempt_dir, ending("failed", run_dir, ["interrupted"]))
        raise
    write_ending(attempt.attempt_dir, end)
    report(end, run_dir, time.monotonic() - began_s)
    return end.code


def report(end: Ending, run_dir: Path, elapsed_s: float) -> None:
    """Print how an attempt ended: on stdout if it went well, on stderr if it failed."""
    if end.kind == "done":
        duration = format_duration(elapsed_s)
        print(f"done in {duration}: {run_dir} (view it with tensorboard --logdir {run_dir})", flush=True)
        return
    if end.kind == "saved":
        print(f"saved after step {end.saved_step}; continue with --resume; exit code {end.code}", flush=True)
        return
    for reason in end.reasons:
        print(f"turnout: {reason}", file=sys.stderr)
    print(f"turnout: the run ended early, exit code {end.code}; logs in {run_dir / 'logs'}", file=sys.stderr)
