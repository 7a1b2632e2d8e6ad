"""The life of a job on a real cluster: warned, requeued, hit by every fault, in the end as if nothing was.

Each fault must end as launch/slurm/requeue_policy.py says, leave its words in the logs, and lose no step that was saved.
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
    """Compare each logged step and all numbers of the last checkpoint with a run that nothing happened to."""
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


def check_logs_kept(run: JobRun, n_starts: int) -> None:
    """See that the job's log tells of every start, and that each start's own logs are there."""
    said = re.findall(r"(attempt-\d+): job", run.log)
    assert said == [f"attempt-{n:05d}" for n in range(1, n_starts + 1)]
    for start in run.starts:
        assert {path.name for path in start.directory.glob("check-*.log")} >= {
            f"check-{node}.log" for node in start.begin.nodes
        }
    assert not list((run.run_dir / "checkpoints").glob("*.tmp"))


@pytest.mark.long  # SLURM looks at limits twice a minute
def test_a_run_is_warned_saves_is_requeued_and_finishes(lab: Lab) -> None:
    """Two nodes with two ranks each, the experts over all of them, and a limit that comes before the end."""
    settings = ["--set", "parallel.ep=4"]
    run = lab.submit("warned", "--time", "30", "--warn-s", "25", *settings, ranks=2)
    run.wait_for_progress(1)
    # A limit that comes soon, but not before SLURM, which looks at limits twice a minute, can warn of it.
    elapsed_s = time.time() - run.starts[0].begin.began_s
    lab.run("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={math.ceil((elapsed_s + 45) / 60)}")
    run.wait_for_ending(1)
    run.wait_for(lambda: run.state() == "PENDING", "the requeue")
    lab.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")
    run.wait_for_progress(2)
    run.cancel()
    last = run.finish(*settings, ranks=2)
    log = run.log
    assert [start.ending.kind for start in run.starts if start.ending] == ["saved", "saved", "done"], log
    assert "SLURM warns of the time limit: stopping" in log and "requeued to go on" in log
    assert [start.begin.restart for start in run.starts] == [0, 1, 0]
    check_logs_kept(run, 3)
    check_as_if_nothing_happened(lab, run, last, *settings, nproc=4)


def test_a_run_goes_on_after_a_killed_rank_and_a_warning(lab: Lab) -> None:
    meet(lab, "rank-faults", kill_a_rank, warn)


@pytest.mark.long  # SLURM takes a minute to miss a node
def test_a_run_goes_on_after_every_other_fault(lab: Lab) -> None:
    faults = (power_off_a_node, cut_off_a_node, stop_a_rank, preempt, requeue_by_hand)
    meet(lab, "other-faults", *faults)


Fault = Callable[[Lab, JobRun, int], None]


def meet(lab: Lab, name: str, *faults: Fault) -> None:
    """Let one run meet these faults, one after the other; it must end as if nothing had happened."""
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
    assert end.reasons[0].startswith("rank 1 ended without a word (killed, or out of memory)"), end
    assert f"rank 1 ran on {run.starts[n - 1].begin.nodes[1]}" in end.reasons
    assert f"step {end.saved_step} was saved since it began" in end.decision


def warn(lab: Lab, run: JobRun, n: int) -> None:
    """Send what SLURM sends before the time limit."""
    lab.run("scancel", "--batch", "--signal=USR1", run.job_id)
    end = run.wait_for_ending(n).ending
    assert end is not None and (end.kind, end.action) == ("saved", "requeue"), end
    assert "SLURM warns of the time limit: stopping" in run.log
    assert run.wait_for_start(n + 1).begin.from_step == end.saved_step


def stop_a_rank(lab: Lab, run: JobRun, n: int) -> None:
    run.rank_process(n, 0).send_signal(signal.SIGSTOP)
    end = run.wait_for_ending(n).ending
    assert end is not None and end.kind == "failed" and end.action == "requeue", end
    assert end.reasons[0].startswith("rank 0 hung (stopped, or stuck in the system)"), end


def requeue_by_hand(lab: Lab, run: JobRun, n: int) -> None:
    lab.run("scontrol", "requeue", run.job_id)
    check_told_and_saved(run, n)


def preempt(lab: Lab, run: JobRun, n: int) -> None:
    """The other job wants all nodes, so the one that was cut off must be back."""
    (spare,) = {f"n{i}" for i in range(1, N_NODES + 1)} - set(run.starts[n - 1].begin.nodes)
    lab.wait_until_back(spare)
    wish = ["-p", "high", "-N", str(N_NODES), "--exclusive", "--output=/dev/null"]
    urgent = lab.run("sbatch", "--parsable", *wish, "--wrap", "sleep 2").strip()
    check_told_and_saved(run, n)
    run.wait_for_start(n + 1)
    assert "COMPLETED" in lab.run("scontrol", "show", "job", urgent), "the run was to wait for it"


def check_told_and_saved(run: JobRun, n: int) -> None:
    end = run.wait_for_ending(n).ending
    assert end is not None and (end.kind, end.action) == ("saved", "leave"), end
    run.wait_for_start(n + 1)
    assert run.starts[n].begin.from_step == end.saved_step


def power_off_a_node(lab: Lab, run: JobRun, n: int) -> None:
    """SLURM finds out, ends what is left and requeues the job, which goes on elsewhere."""
    lost = run.starts[n - 1].begin.nodes[1]
    lab.script("node", lost, "crash")
    start = run.wait_for_start(n + 1)
    assert lost not in start.begin.nodes
    lab.script("node", lost, "start")
    lab.wait_until_back(lost)


def cut_off_a_node(lab: Lab, run: JobRun, n: int) -> None:
    """Its ranks cannot be ended from outside; they find that the run has another owner, and go."""
    lost = run.starts[n - 1].begin.nodes[1]
    stale = run.rank_process(n, 1)
    lab.script("node", lost, "unplug")
    start = run.wait_for_start(n + 1)
    assert lost not in start.begin.nodes
    psutil.wait_procs([stale], timeout=15)
    assert not stale.is_running() or stale.status() == psutil.STATUS_ZOMBIE
    lab.script("node", lost, "plug")  # SLURM finds out within a minute


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
    (start,) = run.starts
    assert start.ending is not None and (start.ending.kind, start.ending.action) == ("saved", "leave")
    run.finish()
    assert run.starts[-1].begin.from_step == start.ending.saved_step
    assert "done" in lab.turnout("status", "cancelled", "--verify")


@pytest.mark.long
def test_a_chain_goes_on_where_nothing_may_be_requeued(lab: Lab) -> None:
    run = lab.submit("chain", "--chain", "3", "--set", "train.n_steps=300")
    run.wait_for_progress(1)
    lab.run("scancel", "--batch", "--signal=USR1", run.job_id)
    log = run.wait_until_gone()
    assert [s.begin.job_id for s in run.starts] == run.job_ids
    assert [s.ending.kind for s in run.starts if s.ending] == ["saved", "done", "done"], log
    assert "nothing left to do" in log and "left to the next of the chain" in log


def test_a_run_goes_on_with_fewer_nodes_at_the_same_batch(lab: Lab) -> None:
    run = lab.submit("fewer", nodes="1-2", ranks=2)
    run.wait_for_progress(1)
    first = run.starts[0].begin
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
    second = run.starts[1]
    assert second.begin.n_ranks == 2 and second.begin.nodes == ("n1",)
    assert second.ending is not None and second.ending.kind == "saved", run.log
    rows = read_rows(run.run_dir)
    assert [row["train/tokens_seen"] for row in rows] == [256 * row["step"] for row in rows]
    provenance = json.loads((run.run_dir / "provenance.json").read_text())
    assert [start["nproc"] for start in provenance["attempts"]] == [4, 4, 2]
