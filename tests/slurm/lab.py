"""A real SLURM cluster on this one machine (cluster.sh), and what tests do to its nodes and jobs."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.distributed.runs.test_train_command import RECIPE
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.launch.ranks.attempt_records import AttemptRecord, read_attempts
from turnout.training.checkpoint.directory import list_checkpoints, step_of

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "unshare")
N_NODES, GPUS = 3, 2
WAIT_S = 180

# Fast steps, and everything that has state: experts spread over all ranks, balancing bias, batch scope.
# There are more steps than any machine can take in a test, and a test says when to finish. The learning
# rate does not depend on the number of steps.
CHANGES = {
    "n_steps = 12": "n_steps = 100000",
    "every_steps = 3": "every_steps = 1\n\n[checkpoint]\nevery_steps = 10\nkeep_last = 100",
    "every_steps = 6": "max_documents = 2",
    "warmup_steps = 2": 'kind = "linear"\nfinal_frac = 1.0\nwarmup_steps = 20',
    'prompts = ["the train"]\n': "",
    "[train]": "[parallel]\nep = 2\ntimeout_s = 10\n\n[train]",
}


def reason_to_skip() -> str | None:
    """Return why no cluster can be started here, or None if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge iproute2 openssh-server pdsh"
    return None if os.geteuid() == 0 else "a SLURM cluster in network namespaces needs root"


class Lab:
    """A cluster of nodes n1, n2, ... and a directory for runs, `place`, that all of them see."""

    def __init__(self, directory: Path, place: Path) -> None:
        self.directory, self.place = directory, place
        self.env = {
            **os.environ,
            "SLURMLAB_DIR": str(directory),
            "SLURMLAB_NODES": str(N_NODES),
            "SLURMLAB_GPUS": str(GPUS),
            "SLURM_CONF": str(directory / "etc" / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def make_place(self) -> None:
        make_corpus(self.place, {"text": make_texts(300)}, valid_frac=0.05, shard_tokens=5000)
        text = RECIPE
        for old, new in CHANGES.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.place / "run.toml").write_text(text)

    def script(self, *arguments: str) -> None:
        subprocess.run([str(SCRIPT), *arguments], env=self.env, check=True, timeout=WAIT_S)

    def run(self, *command: str, code: int = 0, timeout_s: float = WAIT_S) -> str:
        """Run a command in the directory for runs, and return its stdout and stderr."""
        done = subprocess.run(
            command,
            cwd=self.place,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said, said
        return said

    def turnout(self, *arguments: str, code: int = 0, timeout_s: float = WAIT_S) -> str:
        return self.run("turnout", *arguments, code=code, timeout_s=timeout_s)

    def submit(self, name: str, *arguments: str, nodes: str = "2", ranks: int = 1) -> "JobRun":
        """Submit the recipe that make_place wrote."""
        size = ["--nodes", nodes, "--ranks-per-node", str(ranks), "--shared"]
        limits = [] if "--time" in arguments else ["--time", "30", "--warn-s", "60"]
        said = self.turnout("submit", "run.toml", "--run-dir", name, *size, *limits, *arguments)
        return JobRun(self, self.place / name, said.split("submitted job ")[1].split(":")[0].split(", "))

    def in_node(self, node: str, *command: str) -> None:
        """Run a command in the namespaces of a node."""
        pid = (self.directory / "pid" / f"init.{node}").read_text().strip()
        subprocess.run(["nsenter", "-t", pid, "-m", "-n", "-u", "-p", *command], check=True, timeout=WAIT_S)

    def wait_until_back(self, node: str) -> None:
        """Wait until a node accepts jobs again."""
        self.wait_for_state(node, "IDLE")

    def wait_for_state(self, node: str, wanted: str) -> None:
        """Wait until a node is in a state. Not by sinfo, which shows a lost node as mixed for minutes."""
        seen = []

        def is_there() -> bool:
            shown = self.run("scontrol", "--oneliner", "show", "node", node)
            seen.append(shown.split(" State=")[1].split()[0])
            return seen[-1].split("+")[0] == wanted

        try:
            wait_for(is_there, f"{node} {wanted}")
        except AssertionError as err:
            raise AssertionError(f"{err}; it was {', '.join(dict.fromkeys(seen))}") from err

    def wait_until_usable(self) -> None:
        """Wait until all nodes are idle."""
        try:
            wait_for(lambda: {row.split()[1] for row in self.nodes()} == {"idle"}, "idle nodes")
        except AssertionError as err:
            log = (self.directory / "log" / "slurmctld.log").read_text()[-5000:]
            raise AssertionError(f"{err}: {'; '.join(self.nodes())}\n{log}") from err

    def nodes(self) -> list[str]:
        """Return a row for every node: its name, its state and SLURM's reason for it."""
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T %E").splitlines()

    def restart(self) -> None:
        """Start the cluster again, with an empty queue; the runs stay."""
        self.script("down")
        self.script("up")


class JobRun:
    """A run under SLURM."""

    def __init__(self, lab: Lab, run_dir: Path, job_ids: list[str]) -> None:
        self._lab, self.run_dir, self.job_ids = lab, run_dir, job_ids

    @property
    def job_id(self) -> str:
        return self.job_ids[0]

    @property
    def log(self) -> str:
        """Return the output of all batch jobs of this submission."""
        paths = [self.run_dir / "logs" / f"slurm-{job_id}.out" for job_id in self.job_ids]
        return "".join(path.read_text() for path in paths if path.exists())

    @property
    def attempts(self) -> list[AttemptRecord]:
        return read_attempts(self.run_dir)

    def newest_step(self) -> int:
        return max(map(step_of, list_checkpoints(self.run_dir)), default=0)

    def wait_for_attempt(self, n: int) -> AttemptRecord:
        """Wait until attempt n of the run has begun."""
        self.wait_for(lambda: len(self.attempts) >= n, f"attempt {n}")
        return self.attempts[n - 1]

    def wait_for_progress(self, n: int, step: int = 1) -> None:
        """Wait until attempt n has saved a step of its own that is at least this one."""
        attempt = self.wait_for_attempt(n)
        wanted = max(step, attempt.begin.from_step + 1)
        self.wait_for(lambda: self.newest_step() >= wanted, f"a checkpoint of attempt {n}")

    def wait_for_ending(self, n: int) -> AttemptRecord:
        self.wait_for(lambda: self.attempts[n - 1].ending is not None, f"the ending of attempt {n}")
        return self.attempts[n - 1]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        try:
            wait_for(condition, what)
        except AssertionError as err:
            logs = "".join(f"\n== {p}\n{p.read_text()}" for p in self.run_dir.glob("logs/attempt-*/*.log"))
            cluster = ""  # stays empty if the cluster itself is broken
            with suppress(AssertionError, subprocess.TimeoutExpired):
                cluster = "\n".join([*self._lab.nodes(), self._lab.run("squeue", "--all")])
            raise AssertionError(f"{err}\n{cluster}\n{self.log}{logs}") from err

    def wait_until_gone(self) -> str:
        """Wait until no job of this submission is in the queue, and return their output."""
        ids = ",".join(self.job_ids)
        self.wait_for(
            lambda: not self._lab.run("squeue", "-h", "-a", "-o", "%i", f"--jobs={ids}").split(), "its end"
        )
        return self.log

    def cancel(self) -> None:
        """Have its job save and end."""
        self._lab.run("scancel", *self.job_ids)
        self.wait_until_gone()

    def finish(self, *arguments: str, ranks: int = 1) -> int:
        """Submit the run, when its jobs are gone, for a few last steps; return the last step."""
        last = self.newest_step() + 20
        steps = ["--set", f"train.n_steps={last}", "--allow-change", "train.n_steps"]
        again = self._lab.submit(str(self.run_dir), *steps, *arguments, ranks=ranks)
        self.job_ids += again.job_ids
        log = again.wait_until_gone()
        end = self.attempts[-1].ending
        assert end is not None and (end.kind, end.saved_step) == ("done", last), log
        return last

    def state(self) -> str:
        shown = self._lab.run("scontrol", "-o", "show", "job", self.job_id)
        return shown.split("JobState=")[1].split()[0]

    def rank_process(self, n: int, rank: int) -> psutil.Process:
        """Return a rank of attempt n, on whichever node it runs."""
        (found,) = [p for p in self.processes(n) if p.environ().get("RANK") == str(rank)]
        return found

    def processes(self, n: int) -> list[psutil.Process]:
        """Return the processes of the ranks of attempt n."""
        attempt = f"attempt-{n:05d}"
        return [
            p
            for p in psutil.process_iter(["cmdline"])
            if p.info["cmdline"]
            and "turnout.launch.ranks.worker" in p.info["cmdline"]
            and "turnout.launch.ranks.deepspeed_launcher" not in p.info["cmdline"]
            and p.info["cmdline"][-1] == str(self.run_dir / "logs" / attempt)
        ]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come"
        time.sleep(0.2)
