"""The life of a job on a real cluster: warned, requeued, hit by every fault, and nothing is lost.

After each fault the job must do what launch/slurm/requeue_policy.py says, log its reason, and lose no step
that was saved.
"""

import json
import math
import re
import signal
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from tests.distributed.runs.recovery import stored_tensors
from tests.runs import read_rows
from tests.slurm.lab import N_NODES, JobRun, Lab
from turnout.training.checkpoint.directory import CHECKPOINTS, checkpoint_path


def check_as_if_nothing_happened(lab: Lab, run: JobRun, last: int, *settings: str, nproc: int) -> None:
    """Compare each logged step and each tensor of the last checkpoint with those of an undisturbed run."""
    straight = lab.place / f"{run.run_dir.name}-straight"
    train = ["train", "run.toml", "--run-dir", straight.name, "--nproc", str(nproc)]
    lab.turnout(*train, *settings, "--set", f"train.n_steps={last}")
    got, want = ([without_speed(row) for row in read_rows(d)] for d in (run.run_dir, straight))
    assert got == want
    name = checkpoint_path(straight, last).name
    got_tensors, want_tensors = (stored_tensors(d / CHECKPOINTS / name) for d in (run.run_dir, straight))
    assert got_tensors.keys() == want_tensors.keys()
    assert all(torch.equal(got_tensors[key], want) for key, want in want_tensors.items())


def without_speed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))}


def check_logs_kept(run: JobRun, n_attempts: int) -> None:
    """Check that the job's log names every attempt, and that each attempt's own logs are there."""
    named = re.findall(r"(attempt-\d+): job", run.log)
    assert named == [f"attempt-{n:05d}" for n in range(1, n_attempts + 1)]
    for attempt in run.attempts:
        assert {path.name for path in attempt.directory.glob("check-*.log")} >= {
            f"check-{node}.log" for node in attempt.begin.nodes
        }
    assert not list((run.run_dir / "checkpoints").glob("*.tmp"))


@pytest.mark.long  # SLURM looks at limits twice a minute
def test_a_run_is_warned_saves_is_requeued_and_finishes(lab: Lab) -> None:
    """Two nodes with two ranks each, the experts over all of them, and a limit that comes before the end."""
    settings = ["--set", "parallel.ep=4"]
    run = lab.submit("warned", "--time", "30", "--warn-s", "25", *settings, ranks=2)
    run.wait_for_progress(1)
    # A limit that comes soon, but not before SLURM, which looks at limits twice a minute, can warn of it.
    elapsed_s = time.time() - run.attempts[0].begin.began_s
    lab.run("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={math.ceil((elapsed_s + 45) / 60)}")
    run.wait_for_ending(1)
    run.wait_for(lambda: run.state() == "PENDING", "the requeue")
    lab.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")
    run.wait_for_progress(2)
    run.cancel()
    last = run.finish(*settings, ranks=2)
    log = run.log
    assert [attempt.ending.kind for attempt in run.attempts if attempt.ending] == [
        "saved",
        "saved",
        "done",
    ], log
    assert "SLURM warns of the time limit: stopping" in log and "requeued to continue" in log
    assert [attempt.begin.restart for attempt in run.attempts] == [0, 1, 0]
    check_logs_kept(run, 3)
    check_as_if_nothing_happened(lab, run, last, *settings, nproc=4)


def test_a_run_continues_after_a_killed_rank_and_a_warning(lab: Lab) -> None:
    meet(lab, "rank-faults", kill_a_rank, warn)


@pytest.mark.long  # SLURM takes a minute to notice a lost node
def test_a_run_continues_after_every_other_fault(lab: Lab) -> None:
    faults = (power_off_a_node, cut_off_a_node, stop_a_rank, preempt, requeue_by_hand)
    meet(lab, "other-faults", *faults)


Fault = Callable[[Lab, JobRun, int], None]


def meet(lab: Lab, name: str, *faults: Fault) -> None:
    """Let one run meet these faults in turn; it must end like an undisturbed run."""
    run = lab.submit(name)
    for n, fault in enumerate(faults, 1):
        run.wait_for_progress(n)
        fault(lab, run, n)
    run.wait_for_progress(len(faults) + 1)
    run.cancel()
    last = run.finish()
    check_logs_kept(run, len(faults) + 2)
    check_as_if_nothing_happened(lab, run, last, nproc=2)


def kill_a_rank(lab: Lab, run: JobRun, n: int) -> None:
    run.rank_process(n, 1).kill()
    end = run.wait_for_ending(n).ending
    assert end is not None and end.kind == "failed" and end.action == "requeue", end
    assert end.reasons[0].startswith("rank 1 died without an error message (killed, or out of memory)"), end
    assert f"rank 1 ran on {run.attempts[n - 1].begin.nodes[1]}" in end.reasons
    assert f"step {end.saved_step} was saved since it began" in end.decision


def warn(lab: Lab, run: JobRun, n: int) -> None:
    """Send what SLURM sends before the time limit."""
    lab.run("scancel", "--batch", "--signal=USR1", run.job_id)
    end = run.wait_for_ending(n).ending
    assert end is not None and (end.kind, end.action) == ("saved", "requeue"), end
    assert "SLURM warns of the time limit: stopping" in run.log
    assert run.wait_for_attempt(n + 1).begin.from_step == end.saved_step


def stop_a_rank(lab: Lab, run: JobRun, n: int) -> None:
    run.rank_process(n, 0).send_signal(signal.SIGSTOP)
    end = run.wait_for_ending(n).ending
    assert end is not None and end.kind == "failed" and end.action == "requeue", end
    assert end.reasons[0].startswith("rank 0 hung (stopped, or stuck in the system)"), end


def requeue_by_hand(lab: Lab, run: JobRun, n: int) -> None:
    lab.run("scontrol", "requeue", run.job_id)
    check_ended_by_slurm(run, n)


def preempt(lab: Lab, run: JobRun, n: int) -> None:
    """The preempting job needs all nodes, so the one that was cut off must be back."""
    (spare,) = {f"n{i}" for i in range(1, N_NODES + 1)} - set(run.attempts[n - 1].begin.nodes)
    lab.wait_until_back(spare)
    wish = ["-p", "high", "-N", str(N_NODES), "--exclusive", "--output=/dev/null"]
    urgent = lab.run("sbatch", "--parsable", *wish, "--wrap", "sleep 2").strip()
    check_ended_by_slurm(run, n)
    run.wait_for_attempt(n + 1)
    assert "COMPLETED" in lab.run("scontrol", "show", "job", urgent), "the run must wait for it"


def check_ended_by_slurm(run: JobRun, n: int) -> None:
    end = run.wait_for_ending(n).ending
    assert end is not None and (end.kind, end.action) == ("saved", "leave"), end
    run.wait_for_attempt(n + 1)
    assert run.attempts[n].begin.from_step == end.saved_step


def power_off_a_node(lab: Lab, run: JobRun, n: int) -> None:
    """SLURM notices, ends the remaining ranks and requeues the job, which continues on other nodes."""
    lost = run.attempts[n - 1].begin.nodes[1]
    lab.script("node", lost, "crash")
    attempt = run.wait_for_attempt(n + 1)
    assert lost not in attempt.begin.nodes
    lab.script("node", lost, "start")
    lab.wait_until_back(lost)


def cut_off_a_node(lab: Lab, run: JobRun, n: int) -> None:
    """Its ranks cannot be ended from outside; they end when they find another attempt's fencing token."""
    lost = run.attempts[n - 1].begin.nodes[1]
    stale = run.rank_process(n, 1)
    lab.script("node", lost, "unplug")
    attempt = run.wait_for_attempt(n + 1)
    assert lost not in attempt.begin.nodes
    psutil.wait_procs([stale], timeout=15)
    assert not stale.is_running() or stale.status() == psutil.STATUS_ZOMBIE
    lab.script("node", lost, "plug")  # SLURM notices within a minute


def test_a_cancelled_run_saves_stays_ended_and_can_be_submitted_again(lab: Lab) -> None:
    run = lab.submit("cancelled")
    run.wait_for_progress(1)
    assert re.search(r"(?m)^job +\d+ running on n\[1-2\], .* left$", lab.turnout("status", "cancelled"))
    assert re.search(
        rf"(?m)^{run.job_id} +running on n\[1-2\], .* step \d+ .*/cancelled$", lab.turnout("status")
    )
    refused = lab.turnout(
        "submit", "run.toml", "--run-dir", "cancelled", "--nodes", "2", "--ranks-per-node", "1", code=2
    )
    assert f"job {run.job_id} of this run is running" in refused
    lab.run("scancel", run.job_id)
    run.wait_until_gone()
    assert run.state() == "CANCELLED"
    (attempt,) = run.attempts
    assert attempt.ending is not None and (attempt.ending.kind, attempt.ending.action) == ("saved", "leave")
    run.finish()
    assert run.attempts[-1].begin.from_step == attempt.ending.saved_step
    assert "done" in lab.turnout("status", "cancelled", "--verify")


@pytest.mark.long
def test_a_chain_continues_a_run_without_requeueing(lab: Lab) -> None:
    run = lab.submit("chain", "--chain", "3", "--set", "train.n_steps=300")
    run.wait_for_progress(1)
    lab.run("scancel", "--batch", "--signal=USR1", run.job_id)
    log = run.wait_until_gone()
    assert [attempt.begin.job_id for attempt in run.attempts] == run.job_ids
    assert [attempt.ending.kind for attempt in run.attempts if attempt.ending] == ["saved", "done", "done"], (
        log
    )
    assert "nothing left to do" in log and "left to the next job of the chain" in log


def test_a_run_continues_on_fewer_nodes_with_the_same_batch(lab: Lab) -> None:
    run = lab.submit("fewer", nodes="1-2", ranks=2)
    run.wait_for_progress(1)
    first = run.attempts[0].begin
    assert first.n_ranks == 4 and len(first.nodes) == 2
    for node in ("n2", "n3"):
        lab.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    lab.run("scontrol", "requeue", run.job_id)
    try:
        run.wait_for_progress(2)
        run.cancel()
    finally:
        for node in ("n2", "n3"):
            lab.run("scontrol", "update", f"nodename={node}", "state=resume")
    second = run.attempts[1]
    assert second.begin.n_ranks == 2 and second.begin.nodes == ("n1",)
    assert second.ending is not None and second.ending.kind == "saved", run.log
    rows = read_rows(run.run_dir)
    assert [row["train/tokens_seen"] for row in rows] == [256 * row["step"] for row in rows]
    provenance = json.loads((run.run_dir / "provenance.json").read_text())
    assert [attempt["nproc"] for attempt in provenance["attempts"]] == [4, 4, 2]
