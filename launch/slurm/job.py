"""What a batch job runs: `python -m turnout.launch.slurm.job RUN_DIR SUBMISSION` sees one start of a run through, and then
requeues the job, ends it, or stops with the reason.

SLURM's warning and its end of a job arrive here, and become the stop file that the ranks look at.
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
from turnout.launch.ranks.launcher import Ended, free_port
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
from turnout.launch.slurm.time_limit import Limit, measured_margin_s
from turnout.training.errors import CheckpointError, ConfigError, TakenOverError, UnreadableError
from turnout.training.parallel.layout import Layout, name_ranks, plan_layout
from turnout.training.run_control import ask_to_stop, read_status

POLL_S = 1
# After the limit, until a save is given up: SLURM kills what is left after KillWait, 30 s by default.
GRACE_S = 20


class Job:
    """One start of a run inside a SLURM job."""

    def __init__(self, run_dir: Path, directory: Path) -> None:
        self._run_dir, self._directory = run_dir, directory
        self._submission = read_submission(directory)
        self._job_id = os.environ["SLURM_JOB_ID"]
        self._restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._must_stop = False
        self._told_s: float | None = None
        self._limit = Limit(partial(end_time_s, self._job_id), self._margin_s, self._submission.warn_s)

    def run(self) -> int:
        """See one start through, and return the exit code of the batch script."""
        signal.signal(signal.SIGUSR1, self._on_warning)
        signal.signal(signal.SIGTERM, self._on_end)
        self._limit.ask()
        records = self._records()
        if records and records[-1].ending is not None and records[-1].ending.action == "stop":
            say(f"not started: {records[-1].ending.decision}. Mend the cause, and submit the run again")
            return records[-1].ending.code
        nodes = hostnames(os.environ["SLURM_JOB_NODELIST"])
        n_ranks = len(nodes) * self._submission.ranks_per_node
        job = {"job_id": self._job_id, "restart": self._restart, "submission": self._directory.name}
        begin = begin_here(n_ranks, newest_step(self._run_dir), nodes, **job)
        attempt_dir = make_attempt_dir(self._run_dir / "logs")
        write_begin(attempt_dir, begin)
        say(f"{attempt_dir.name}: job {self._job_id}, restart {self._restart}, on {', '.join(nodes)}")
        end = self._supervise(attempt_dir, begin)
        decision = self._decide(AttemptRecord(attempt_dir, begin, end))
        for reason in end.reasons:
            say(reason)
        return self._act(decision, end, attempt_dir)

    def _supervise(self, attempt_dir: Path, begin: Begin) -> Ending:
        """Check the nodes, take up the run and start its ranks; return how that ended."""
        try:
            return self._start(attempt_dir, begin)
        except UnreadableError as err:  # the disk may answer again
            return ending("failed", self._run_dir, [str(err)], failed_step=0)
        except (CheckpointError, ConfigError, DataError) as err:
            return ending("failed", self._run_dir, [str(err)], code=exit_code(err), is_final=True)
        except TakenOverError as err:
            return ending("overtaken", self._run_dir, [str(err)])
        except (OSError, SlurmError) as err:
            return ending("failed", self._run_dir, [str(err)], failed_step=0)

    def _start(self, attempt_dir: Path, begin: Begin) -> Ending:
        nodes, port = begin.nodes, free_port()
        # First: ranks of an earlier start may still run on a node that was cut off.
        start = claim(self._run_dir, attempt_dir, Layout(1))
        cfg = load_config(str(self._directory / RECIPE_FILE))
        read_manifest(Path(cfg.data.corpus))  # where it is gone, no node is to blame
        blamed, reasons = check_nodes(
            self._run_dir, self._directory, attempt_dir, nodes, port, self._submission
        )
        if self._is_out_of_time():
            words = "the time limit came before ranks could start: raise --time"
            return ending("failed", self._run_dir, [words], failed_step=0)
        if self._told_s is not None:
            return ending("told", self._run_dir)
        if reasons:
            return ending("unfit", self._run_dir, reasons, nodes=tuple(blamed))
        n_nodes, cfg = fit_to_nodes(cfg, len(nodes), self._submission.ranks_per_node)
        used, n_ranks = nodes[:n_nodes], n_nodes * self._submission.ranks_per_node
        if n_nodes < len(nodes):
            say(f"{n_nodes} of {len(nodes)} nodes are used: the batch and the layout fit no more")
            write_begin(attempt_dir, replace(begin, nodes=used, n_ranks=n_ranks))
        start.fencing_token.check()  # checking took a while, and what follows writes to the run's directory
        check_machine(cfg, self._submission.ranks_per_node)
        corpus = check_corpus(cfg)
        newest = resume_run(
            self._run_dir, cfg, corpus, nproc=n_ranks, allowed_changes=self._submission.allowed_changes
        )
        if newest is not None and is_finished(*newest, cfg):
            say(nothing_left(self._run_dir, cfg))
            return ending("done", self._run_dir)
        start = replace(start, layout=plan_layout(cfg, n_ranks))
        plan = plan_nodes(used, self._submission, port, "turnout.launch.ranks.worker")
        return self._told_apart(supervise(start, lambda: self._launch(start, plan)), plan)

    def _launch(self, start: Attempt, plan: JobPlan) -> Ended:
        """Run the ranks under srun until they have ended, and have them stop before the time limit."""
        write_plan(start.attempt_dir, plan)
        say(f"{len(plan.nodes) * plan.nproc} ranks on {', '.join(plan.nodes)}")
        command = srun_command(
            plan.nodes,
            "turnout.launch.slurm.node",
            [str(start.run_dir), str(start.attempt_dir)],
            log="node",
            options=self._submission.srun_options,
        )
        step = subprocess.Popen(command, cwd=start.attempt_dir)
        try:
            while step.poll() is None and not self._must_go(start.attempt_dir):
                time.sleep(POLL_S)
                self._look_around(start)
        finally:
            step.kill()
            step.wait()
        # What the ranks left tells how it went, not srun's code, which is that of the last task killed.
        return Ended(is_done=True, stuck=read_stuck(start.attempt_dir))

    def _must_go(self, attempt_dir: Path) -> bool:
        """Return whether there is no time to wait for the processes of a start."""
        if self._told_s is None:
            return False
        return is_over(attempt_dir) or (self._is_out_of_time() and time.time() - self._told_s > GRACE_S)

    def _look_around(self, start: Attempt) -> None:
        """Have the ranks stop where it is time to. Raises TakenOverError where the run has a later start."""
        # Not once told to end: SLURM then gives the present as the end.
        is_near = self._told_s is None and self._limit.is_near()
        if is_near and not self._must_stop:
            left_s, margin_s = self._limit.left_s(), self._limit.margin_s
            say(f"stopping: {left_s:.0f} s are left, and {margin_s:.0f} are needed to save")
            self._must_stop = True
        # Here and not in a signal handler: a disk that refuses now may take it at the next look.
        if self._must_stop:
            with suppress(OSError):
                ask_to_stop(start.attempt_dir)
        with suppress(OSError):
            start.fencing_token.check()

    def _margin_s(self) -> float | None:
        return measured_margin_s([record.directory for record in read_attempts(self._run_dir)])

    def _told_apart(self, end: Ending, plan: JobPlan) -> Ending:
        """Tell an end from outside, or a node that went away, from a failure of the run."""
        if end.kind != "failed" or end.is_final:
            return end
        if self._is_out_of_time():
            words = "the time limit came before the run had saved: raise --warn-s"
            return replace(end, reasons=(words, *end.reasons))
        if self._told_s is not None:
            return replace(end, kind="told", reasons=())
        reasons = (*end.reasons, *named_nodes(end.reasons, plan))
        lost: list[str] = []
        with suppress(SlurmError):  # it does not answer, so that nothing is known against a node
            lost = unreachable_nodes(plan.nodes)
        if not lost:
            return replace(end, reasons=reasons)
        words = f"node {', '.join(lost)} does not answer"
        return replace(end, kind="lost", nodes=tuple(lost), reasons=(words, *reasons))

    def _decide(self, this: AttemptRecord) -> Decision:
        records = [r for r in self._records() if r.directory != this.directory]
        is_told = self._told_s is not None and not self._is_out_of_time()
        decision = decide([*records, this], max_failures=self._submission.max_failures, is_told=is_told)
        if decision.action == "requeue" and self._submission.is_chain:
            assert this.ending is not None
            words = (
                f"{this.ending.kind}, step {this.ending.saved_step} is saved: left to the next of the chain"
            )
            return Decision("leave", words)
        return decision

    def _records(self) -> list[AttemptRecord]:
        name = self._directory.name
        return [record for record in read_attempts(self._run_dir) if record.begin.submission == name]

    def _is_out_of_time(self) -> bool:
        """Return whether SLURM ends the job because of its time limit, after which it requeues nothing."""
        return self._told_s is not None and self._limit.is_reached(self._told_s)

    def _act(self, decision: Decision, end: Ending, attempt_dir: Path) -> int:
        """Do as was decided, and write it down before; return the exit code."""
        say(decision.words)
        write_ending(attempt_dir, replace(end, action=decision.action, decision=decision.words))
        if decision.action == "finish":
            return DONE
        if decision.action == "requeue":
            # SLURM ends this process and its children by it while the job is being requeued.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                if words := requeue(self._job_id, decision.excluded):
                    say(words)
            except SlurmError as err:
                say(str(err))
                write_ending(attempt_dir, replace(end, action="stop", decision=str(err)))
        return end.code

    def _on_warning(self, signum: int, frame: FrameType | None) -> None:
        say("SLURM warns of the time limit: stopping")
        self._must_stop = True
        self._limit.is_stale = True

    def _on_end(self, signum: int, frame: FrameType | None) -> None:
        self._must_stop = True
        self._told_s = self._told_s or time.time()


def is_over(attempt_dir: Path) -> bool:
    status = read_status(attempt_dir)
    return status is not None and status.state != "training"


def named_nodes(reasons: Sequence[str], plan: JobPlan) -> list[str]:
    """Say on which nodes the ranks were that the first reason names."""
    match = re.match(r"ranks? ([\d, ]+)", next(iter(reasons), ""))
    if match is None:
        return []
    ranks_of: dict[str, list[int]] = {}
    for rank in map(int, re.findall(r"\d+", match[1])):
        ranks_of.setdefault(plan.nodes[rank // plan.nproc], []).append(rank)
    return ["; ".join(f"{name_ranks(ranks)} ran on {node}" for node, ranks in ranks_of.items())]


def preflight(run_dir: Path, directory: Path) -> int:
    """Check the nodes, and that all ranks reach one another; say what is wrong."""
    submission, nodes = read_submission(directory), hostnames(os.environ["SLURM_JOB_NODELIST"])
    attempt_dir, port = make_attempt_dir(directory / "logs"), free_port()
    signal.signal(signal.SIGTERM, partial(_give_up, attempt_dir))
    _, reasons = check_nodes(run_dir, directory, attempt_dir, nodes, port, submission)
    layout = Layout(len(nodes) * submission.ranks_per_node)
    if not reasons:
        start = claim(directory, attempt_dir, layout)
        plan = plan_nodes(nodes, submission, port, "turnout.launch.ranks.collective_check")
        write_plan(attempt_dir, plan)
        command = srun_command(
            nodes,
            "turnout.launch.slurm.node",
            [str(directory), str(attempt_dir)],
            log=None,
            options=submission.srun_options,
        )

        def launch() -> Ended:
            subprocess.run(command, cwd=attempt_dir, check=False)
            return Ended(is_done=True, stuck=read_stuck(attempt_dir))

        reasons = list(supervise(start, launch).reasons)
        reasons += named_nodes(reasons, plan)
    for reason in reasons:
        say(reason)
    if reasons:
        return OTHER
    say(f"{', '.join(nodes)}: all is well")
    (directory / PASSED).touch()
    return DONE


def _give_up(attempt_dir: Path, signum: int, frame: FrameType | None) -> None:
    say(f"ended by SLURM before all was checked; {attempt_dir} tells how far it came")
    os._exit(OTHER)


def say(words: str) -> None:
    # Not print, which a signal handler must not enter while it is at work.
    os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n".encode())


def main() -> None:
    run_dir, directory = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        is_preflight = read_submission(directory).is_preflight
        code = preflight(run_dir, directory) if is_preflight else Job(run_dir, directory).run()
    except (OSError, SlurmError) as err:
        # Without its record a job cannot tell how often it has failed, so it is not requeued.
        say(f"stopped: {err}")
        code = OTHER
    sys.exit(code)


if __name__ == "__main__":
    main()
