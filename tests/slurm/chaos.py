"""Random faults in one run, by hand: `python -m tests.slurm.chaos --seed 1 --faults 20` (LOG.md has results).

They come at random moments, also while nodes are checked, ranks start or a checkpoint is written. In the
end the last checkpoint must equal that of an undisturbed run, bit for bit.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tests.distributed.runs.recovery import stored_tensors
from tests.slurm.lab import JobRun, Lab, reason_to_skip, wait_for
from turnout.training.checkpoint.directory import checkpoint_path

# More than the failures without progress that 20 faults can cause: chaos is no reason to give up.
PATIENT = ["--max-failures", "50"]
START_S, STRAIGHT_S = 20, 3600


class Chaos:
    """The faults, each a method; after each the cluster is whole again and the run continues."""

    def __init__(self, lab: Lab, run: JobRun, seed: int) -> None:
        self._lab, self._run, self._random = lab, run, random.Random(seed)
        self._faults: list[Callable[[], str]] = [
            self.kill_a_rank,
            self.stop_a_rank,
            self.kill_a_launcher,
            self.kill_the_supervisor,
            self.requeue,
            self.warn,
            self.preempt,
            self.power_off_a_node,
            self.cut_off_a_node,
        ]

    def strike(self) -> str:
        """Wait for a random time, cause a fault, and wait for the next attempt; return what was done."""
        n = len(self._run.attempts)
        time.sleep(self._random.uniform(0, START_S))
        done = self._random.choice(self._faults)()
        self._run.wait_for_attempt(n + 1)
        return done

    def kill_a_rank(self) -> str:
        process = self._random.choice(self._ranks())
        process.kill()
        return "rank killed"

    def stop_a_rank(self) -> str:
        process = self._random.choice(self._ranks())
        process.suspend()
        return "rank stopped"

    def kill_a_launcher(self) -> str:
        self._random.choice(self._found("turnout.launch.slurm.node")).kill()
        return "launcher of a node killed"

    def kill_the_supervisor(self) -> str:
        """The job fails without a message, and a person requeues it."""
        (process,) = self._found("turnout.launch.slurm.job")
        process.kill()
        wait_for(lambda: self._run.state() in ("FAILED", "CANCELLED", "NODE_FAIL"), "the job's end")
        self._lab.run("scontrol", "requeue", self._run.job_id)
        return "supervisor killed"

    def requeue(self) -> str:
        self._lab.run("scontrol", "requeue", self._run.job_id)
        return "requeued by hand"

    def warn(self) -> str:
        self._found("turnout.launch.slurm.job")
        self._lab.run("scancel", "--batch", "--signal=USR1", self._run.job_id)
        return "warned"

    def preempt(self) -> str:
        wish = ["-p", "high", "-N", "3", "--exclusive", "--output=/dev/null"]
        self._lab.run("sbatch", *wish, "--wrap", "sleep 2")
        return "preempted"

    def power_off_a_node(self) -> str:
        return self._lose_a_node("crash", "start")

    def cut_off_a_node(self) -> str:
        return self._lose_a_node("unplug", "plug")

    def _lose_a_node(self, lose: str, bring_back: str) -> str:
        node = self._random.choice(self._nodes())
        self._lab.script("node", node, lose)
        self._lab.wait_for_state(node, "DOWN")
        self._lab.script("node", node, bring_back)
        self._lab.wait_until_back(node)
        return f"{node}: {lose}, {bring_back}"

    def _nodes(self) -> tuple[str, ...]:
        return self._run.attempts[-1].begin.nodes

    def _ranks(self) -> list[psutil.Process]:
        wait_for(lambda: bool(self._run.processes(len(self._run.attempts))), "ranks")
        return self._run.processes(len(self._run.attempts))

    def _found(self, module: str) -> list[psutil.Process]:
        """Return the processes of this run that execute a module of turnout."""

        def look() -> list[psutil.Process]:
            return [
                p
                for p in psutil.process_iter(["cmdline"])
                if module in (p.info["cmdline"] or ()) and str(self._run.run_dir) in p.info["cmdline"]
            ]

        wait_for(lambda: bool(look()), module)
        return look()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20)
    wanted = parser.parse_args()
    if (reason := reason_to_skip()) is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as name:
        lab = Lab(Path(name) / "lab", Path(name) / "place")
        lab.place.mkdir()
        lab.make_place()
        lab.script("up")
        try:
            strike_and_compare(lab, wanted.seed, wanted.faults)
        finally:
            lab.script("down")


def strike_and_compare(lab: Lab, seed: int, n_faults: int) -> None:
    run = lab.submit("chaos", *PATIENT)
    run.wait_for_attempt(1)
    chaos = Chaos(lab, run, seed)
    for n in range(1, n_faults + 1):
        step, done = run.newest_step(), chaos.strike()
        print(f"{n:2} {done:26} step {step} was saved before, {run.newest_step()} after", flush=True)
    run.cancel()
    last = run.finish()
    kinds = [one.ending.kind if one.ending else "cut off" for one in run.attempts]
    print(
        f"{len(kinds)} attempts: {', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))}"
    )
    lab.turnout(
        "train", "run.toml", "--run-dir", "straight", "--nproc", "2", "--set", f"train.n_steps={last}"
    )
    got, want = (stored_tensors(checkpoint_path(lab.place / name, last)) for name in ("chaos", "straight"))
    differing = [key for key in want if not torch.equal(got[key], want[key])]
    print(f"{len(want)} tensors of the checkpoint of step {last}, {len(differing)} differ")
    sys.exit(bool(differing) or got.keys() != want.keys())


if __name__ == "__main__":
    main()
