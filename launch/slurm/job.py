"""What a batch job runs: `python -m turnout.launch.slurm.job RUN_DIR SUBMISSION`, one attempt at a run.

The life of a job, in order (Job.run):

1. Record the attempt, and claim the run directory: ranks of an earlier attempt that still run then end.
2. Check the nodes, and fit the run to them.
3. Resume the run, and start the ranks: srun runs launch/slurm/node.py on each node.
4. Until they have ended, compare each second the time left with the time that a save takes, and check
   the fencing token.
5. Classify how the attempt ended, decide what to do next (requeue_policy.py), and do it: requeue the job,
   let it end, or stop with the reason.

SLURM sends two signals. Its warning before the time limit is SIGUSR1. SIGTERM means that SLURM ends the
job: it was cancelled, preempted or requeued, or its time is up. Both handlers (_on_warning, _on_sigterm)
only set flags. The next look (_watch) writes the stop file, and the ranks save at their
next step boundary and end.

A preflight runs only the checks of 2 and a sum over all ranks.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

from turnout.data.errors import DataError
from turnout.data.manifest import read_manifest
from turnout.launch.exit_codes import DONE, OTHER, exit_code
from turnout.launch.preflight import check_corpus, check_machine
from turnout.launch.ranks.attempt import Attempt, claim, is_finished, nothing_left, resume_run, supervise
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.attempt_records import (
    AttemptRecord,
    Begin,
    Ending,
    begin_here,
    ending,
    newest_step,
    read_attempts,
    write_begin,
    write_ending,
)
from turnout.launch.ranks.launcher import RanksOutcome, free_port
from turnout.launch.settings import load_config
from turnout.launch.slurm.client import (
    SlurmError,
    end_time_s,
    hostnames,
    requeue,
    srun_command,
    unreachable_nodes,
)
from turnout.launch.slurm.elastic import fit_to_nodes
from turnout.launch.slurm.node import JobPlan, plan_nodes, read_stuck, write_plan
from turnout.launch.slurm.node_report import check_nodes
from turnout.launch.slurm.requeue_policy import Decision, decide
from turnout.launch.slurm.submission import PASSED, RECIPE_FILE, read_submission
from turnout.launch.slurm.time_limit import TimeLimit, measured_margin_s
from turnout.training.errors import CheckpointError, ConfigError, TakenOverError, UnreadableError
from turnout.training.parallel.layout import Layout, name_ranks, plan_layout
from turnout.training.run_control import ask_to_stop, read_status

POLL_S = 1
# How long a save may last once the time limit is reached. SLURM kills what is left after KillWait, 30 s by
# default.
GRACE_S = 20


class Job:
    """One attempt at a run, inside a SLURM job."""

    def __init__(self, run_dir: Path, directory: Path) -> None:
        self._run_dir, self._directory = run_dir, directory
        self._submission = read_submission(directory)
        self._job_id = os.environ["SLURM_JOB_ID"]
        self._restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._limit = TimeLimit(partial(end_time_s, self._job_id), self._margin_s, self._submission.warn_s)
        self._must_stop = False  # the ranks are to save and end
        self._sigterm_s: float | None = None  # when SLURM's first SIGTERM arrived, Unix time

    def run(self) -> int:
        """Make one attempt, and return the exit code of the batch script."""
        signal.signal(signal.SIGUSR1, self._on_warning)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._limit.refresh()
        records = self._records()
        if records and records[-1].ending is not None and records[-1].ending.action == "stop":
            log(f"not started: {records[-1].ending.decision}. Fix the cause, and submit the run again")
            return records[-1].ending.code
        nodes = hostnames(os.environ["SLURM_JOB_NODELIST"])
        n_ranks = len(nodes) * self._submission.ranks_per_node
        job = {"job_id": self._job_id, "restart": self._restart, "submission": self._directory.name}
        begin = begin_here(n_ranks, newest_step(self._run_dir), nodes, **job)
        attempt_dir = make_attempt_dir(self._run_dir / "logs")
        write_begin(attempt_dir, begin)
        log(f"{attempt_dir.name}: job {self._job_id}, restart {self._restart}, on {', '.join(nodes)}")
        end = self._attempt(attempt_dir, begin)
        decision = self._decide(AttemptRecord(attempt_dir, begin, end))
        for reason in end.reasons:
            log(reason)
        return self._act(decision, end, attempt_dir)

    # ---- check the nodes, resume the run, start the ranks ----

    def _attempt(self, attempt_dir: Path, begin: Begin) -> Ending:
        """Make the attempt; turn every error on the way to its ranks into an ending."""
        try:
            return self._check_and_train(attempt_dir, begin)
        except UnreadableError as err:  # not final: the disk may answer again
            return ending("failed", self._run_dir, [str(err)], failed_step=0)
        except (CheckpointError, ConfigError, DataError) as err:
            return ending("failed", self._run_dir, [str(err)], code=exit_code(err), is_final=True)
        except TakenOverError as err:
            return ending("overtaken", self._run_dir, [str(err)])
        except (OSError, SlurmError) as err:
            return ending("failed", self._run_dir, [str(err)], failed_step=0)

    def _check_and_train(self, attempt_dir: Path, begin: Begin) -> Ending:
        nodes, port = begin.nodes, free_port()
        # First: ranks of an earlier attempt may still run on a node that was cut off.
        attempt = claim(self._run_dir, attempt_dir, Layout(1))
        cfg = load_config(str(self._directory / RECIPE_FILE))
        read_manifest(Path(cfg.data.corpus))  # a missing corpus must not be blamed on a node
        blamed, reasons = check_nodes(
            self._run_dir, self._directory, attempt_dir, nodes, port, self._submission
        )
        if self._is_out_of_time():
            reason = "the time limit came before ranks could start: raise --time"
            return ending("failed", self._run_dir, [reason], failed_step=0)
        if self._sigterm_s is not None:
            return ending("told", self._run_dir)
        if reasons:
            return ending("unfit", self._run_dir, reasons, nodes=tuple(blamed))
        n_nodes, cfg = fit_to_nodes(cfg, len(nodes), self._submission.ranks_per_node)
        used, n_ranks = nodes[:n_nodes], n_nodes * self._submission.ranks_per_node
        if n_nodes < len(nodes):
            log(f"{n_nodes} of {len(nodes)} nodes are used: the batch and the layout do not fit on more")
            write_begin(attempt_dir, replace(begin, nodes=used, n_ranks=n_ranks))
        # The checks took a while, and the next lines write to the run directory.
        attempt.fencing_token.check()
        check_machine(cfg, self._submission.ranks_per_node)
        corpus = check_corpus(cfg)
        newest = resume_run(
            self._run_dir, cfg, corpus, nproc=n_ranks, allowed_changes=self._submission.allowed_changes
        )
        if newest is not None and is_finished(*newest, cfg):
            log(nothing_left(self._run_dir, cfg))
            return ending("done", self._run_dir)
        attempt = replace(attempt, layout=plan_layout(cfg, n_ranks))
        plan = plan_nodes(used, self._submission, port, "turnout.launch.ranks.worker")
        return self._classify(supervise(attempt, lambda: self._run_ranks(attempt, plan)), plan)

    def _run_ranks(self, attempt: Attempt, plan: JobPlan) -> RanksOutcome:
        """Run the ranks under srun until they have ended, and have them stop before the time limit."""
        write_plan(attempt.attempt_dir, plan)
        log(f"{len(plan.nodes) * plan.nproc} ranks on {', '.join(plan.nodes)}")
        command = srun_command(
            plan.nodes,
            "turnout.launch.slurm.node",
            [str(attempt.run_dir), str(attempt.attempt_dir)],
            log="node",
            options=self._submission.srun_options,
        )
        step = subprocess.Popen(command, cwd=attempt.attempt_dir)
        try:
            while step.poll() is None and not self._must_leave(attempt.attempt_dir):
                time.sleep(POLL_S)
                self._watch(attempt)
        finally:
            step.kill()
            step.wait()
        # Not srun's exit code, which is that of the last task killed: the files of the ranks tell how it
        # went.
        return RanksOutcome(is_done=True, stuck=read_stuck(attempt.attempt_dir))

    # ---- SLURM's signals, the time limit and the fencing token ----

    def _on_warning(self, signum: int, frame: FrameType | None) -> None:
        log("SLURM warns of the time limit: stopping")
        self._must_stop = True
        self._limit.is_stale = True

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._must_stop = True
        self._sigterm_s = self._sigterm_s or time.time()

    def _watch(self, attempt: Attempt) -> None:
        """Have the ranks stop when it is time; the fencing token raises if a later attempt has the run."""
        # Not after SIGTERM: SLURM then gives the present as the job's end.
        is_near = self._sigterm_s is None and self._limit.is_near()
        if is_near and not self._must_stop:
            left_s, margin_s = self._limit.left_s(), self._limit.margin_s
            log(f"stopping: {left_s:.0f} s are left, and {margin_s:.0f} are needed to save")
            self._must_stop = True
        # Here and not in a signal handler: a disk that refuses the file now may accept it at the next look.
        if self._must_stop:
            with suppress(OSError):
                ask_to_stop(attempt.attempt_dir)
        with suppress(OSError):
            attempt.fencing_token.check()

    def _must_leave(self, attempt_dir: Path) -> bool:
        """Return whether SLURM ends the job, and the ranks have saved or GRACE_S is over."""
        if self._sigterm_s is None:
            return False
        return is_over(attempt_dir) or (self._is_out_of_time() and time.time() - self._sigterm_s > GRACE_S)

    def _is_out_of_time(self) -> bool:
        """Return whether SLURM ends the job because of its time limit, after which it requeues nothing."""
        return self._sigterm_s is not None and self._limit.is_reached(self._sigterm_s)

    def _margin_s(self) -> float | None:
        return measured_margin_s([record.directory for record in read_attempts(self._run_dir)])

    # ---- how the attempt ended, and what to do next ----

    def _classify(self, end: Ending, plan: JobPlan) -> Ending:
        """Distinguish a failure of the run from an end by SLURM and from a lost node."""
        if end.kind != "failed" or end.is_final:
            return end
        if self._is_out_of_time():
            reason = "the time limit came before the run had saved: raise --warn-s"
            return replace(end, reasons=(reason, *end.reasons))
        if self._sigterm_s is not None:
            return replace(end, kind="told", reasons=())
        reasons = (*end.reasons, *locate_ranks(end.reasons, plan))
        lost: list[str] = []
        with suppress(SlurmError):  # no answer from SLURM: nothing speaks against a node
            lost = unreachable_nodes(plan.nodes)
        if not lost:
            return replace(end, reasons=reasons)
        reason = f"node {', '.join(lost)} does not answer"
        return replace(end, kind="lost", nodes=tuple(lost), reasons=(reason, *reasons))

    def _decide(self, this: AttemptRecord) -> Decision:
        records = [record for record in self._records() if record.directory != this.directory]
        decision = decide(
            [*records, this],
            max_failures=self._submission.max_failures,
            is_ended_by_slurm=self._sigterm_s is not None and not self._is_out_of_time(),
        )
        if decision.action == "requeue" and self._submission.is_chain:
            assert this.ending is not None
            saved = f"{this.ending.kind}, step {this.ending.saved_step} is saved"
            return Decision("leave", f"{saved}: left to the next job of the chain")
        return decision

    def _records(self) -> list[AttemptRecord]:
        """Return the attempts of this submission, oldest first."""
        name = self._directory.name
        return [record for record in read_attempts(self._run_dir) if record.begin.submission == name]

    def _act(self, decision: Decision, end: Ending, attempt_dir: Path) -> int:
        """Record the decision, then carry it out; return the exit code."""
        log(decision.explanation)
        write_ending(attempt_dir, replace(end, action=decision.action, decision=decision.explanation))
        if decision.action == "finish":
            return DONE
        if decision.action == "requeue":
            # SLURM sends SIGTERM to this process and its children while it requeues the job.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                if warning := requeue(self._job_id, decision.excluded):
                    log(warning)
            except SlurmError as err:
                log(str(err))
                write_ending(attempt_dir, replace(end, action="stop", decision=str(err)))
        return end.code


def is_over(attempt_dir: Path) -> bool:
    """Return whether the ranks have saved or finished."""
    status = read_status(attempt_dir)
    return status is not None and status.state != "training"


def locate_ranks(reasons: Sequence[str], plan: JobPlan) -> list[str]:
    """Return a line with the nodes of the ranks that the first reason names; none if it names no ranks."""
    match = re.match(r"ranks? ([\d, ]+)", next(iter(reasons), ""))
    if match is None:
        return []
    ranks_of: dict[str, list[int]] = {}
    for rank in map(int, re.findall(r"\d+", match[1])):
        ranks_of.setdefault(plan.nodes[rank // plan.nproc], []).append(rank)
    return ["; ".join(f"{name_ranks(ranks)} ran on {node}" for node, ranks in ranks_of.items())]


def preflight(run_dir: Path, directory: Path) -> int:
    """Check the nodes, and that all ranks reach one another; print the problems, return the exit code."""
    submission, nodes = read_submission(directory), hostnames(os.environ["SLURM_JOB_NODELIST"])
    attempt_dir, port = make_attempt_dir(directory / "logs"), free_port()
    signal.signal(signal.SIGTERM, partial(_give_up, attempt_dir))
    _, reasons = check_nodes(run_dir, directory, attempt_dir, nodes, port, submission)
    layout = Layout(len(nodes) * submission.ranks_per_node)
    if not reasons:
        attempt = claim(directory, attempt_dir, layout)
        plan = plan_nodes(nodes, submission, port, "turnout.launch.ranks.collective_check")
        write_plan(attempt_dir, plan)
        command = srun_command(
            nodes,
            "turnout.launch.slurm.node",
            [str(directory), str(attempt_dir)],
            log=None,
            options=submission.srun_options,
        )

        def launch() -> RanksOutcome:
            subprocess.run(command, cwd=attempt_dir, check=False)
            return RanksOutcome(is_done=True, stuck=read_stuck(attempt_dir))

        reasons = list(supervise(attempt, launch).reasons)
        reasons += locate_ranks(reasons, plan)
    for reason in reasons:
        log(reason)
    if reasons:
        return OTHER
    log(f"{', '.join(nodes)}: all is well")
    (directory / PASSED).touch()
    return DONE


def _give_up(attempt_dir: Path, signum: int, frame: FrameType | None) -> None:
    log(f"ended by SLURM before all was checked; {attempt_dir} shows how far it came")
    os._exit(OTHER)


def log(text: str) -> None:
    """Write a line with the time to the job's output."""
    # Not print: a signal handler may interrupt a print, and must not start another.
    os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())


def main() -> None:
    run_dir, directory = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        is_preflight = read_submission(directory).is_preflight
        code = preflight(run_dir, directory) if is_preflight else Job(run_dir, directory).run()
    except (OSError, SlurmError) as err:
        # Not requeued: without its records a job does not know how often it has failed.
        log(f"stopped: {err}")
        code = OTHER
    sys.exit(code)


if __name__ == "__main__":
    main()
