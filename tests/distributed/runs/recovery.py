"""What the recovery tests share: a corpus and a recipe, runs to kill, and checks of what they leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.distributed.runs.sabotaged_rank import SABOTAGE, Fault
from tests.distributed.runs.test_train_command import RECIPE
from tests.runs import read_rows
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.data.corpus import open_corpus
from turnout.launch.ranks.parent import die_with_parent
from turnout.launch.settings import load_config
from turnout.training.batches import build_loader
from turnout.training.checkpoint.directory import checkpoint_path

ROOT = Path(__file__).parents[3]
N_STEPS, SAVED_EVERY, BATCH_SEQS = 20, 5, 8
# Accumulation, recomputation, experts split over two ranks, bias, batch scope: everything that carries state.
CHANGES = {
    "n_steps = 12": f"n_steps = {N_STEPS}",
    "microbatch_seqs = 2": 'microbatch_seqs = 1\nrecompute = "full"',
    "every_steps = 3": f"every_steps = 1\n\n[checkpoint]\nevery_steps = {SAVED_EVERY}",
    "every_steps = 6": "every_steps = 10",
    "[train]": "[parallel]\nep = 2\n\n[train]",
}
TIMEOUT_S = 240


def make_place(directory: Path) -> Path:
    """Make a corpus and a recipe in a directory where runs are then started."""
    make_corpus(directory, {"text": make_texts(300)}, valid_frac=0.05, shard_tokens=5000)
    text = RECIPE
    for old, new in CHANGES.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (directory / "run.toml").write_text(text)
    return directory


class Started:
    """A running `turnout train run.toml`.

    With faults, or with a directory that records the samples seen, its ranks are those of sabotaged_rank.py.
    """

    def __init__(
        self,
        run_dir: Path,
        *settings: str,
        nproc: int = 2,
        is_resumed: bool = False,
        faults: tuple[Fault, ...] = (),
        seen: Path | None = None,
        slower_s: float = 0,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        module = "tests.distributed.runs.sabotaged_train" if faults or seen else "turnout"
        command = [sys.executable, "-m", module, "train", "run.toml", "--run-dir", run_dir.name]
        command += ["--nproc", str(nproc)] + ["--resume"] * is_resumed
        command += [word for setting in settings for word in ("--set", setting)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        sabotage = {
            "faults": [asdict(fault) for fault in faults],
            "seen": str(seen or run_dir.parent),
            "slower_s": slower_s,
        }
        self.run_dir = run_dir
        self._process = subprocess.Popen(
            command,
            cwd=run_dir.parent,
            env={**env, SABOTAGE: json.dumps(sabotage)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: _begin(preexec),
        )

    def wait(self, code: int = 0) -> "Ended":
        """Wait for the command to end with this exit code."""
        stdout, stderr = self._process.communicate(timeout=TIMEOUT_S)
        assert self._process.returncode == code, f"{self._process.returncode}\n{stdout}\n{stderr}"
        assert "Traceback" not in stderr, stderr
        return Ended(self.run_dir, code, stdout, stderr)

    def wait_for(self, *paths: Path) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not all(path.exists() for path in paths):
            if time.monotonic() > deadline_s or self._process.poll() is not None:
                self._process.terminate()
                raise AssertionError(f"{paths} did not appear: {self._process.communicate()}")
            time.sleep(0.02)

    def terminate(self) -> None:
        self._process.terminate()

    def suspend(self) -> None:
        """Suspend the command, but not its ranks."""
        self._process.send_signal(signal.SIGSTOP)

    def continue_when_ranks_are_gone(self) -> None:
        (launcher,) = psutil.Process(self._process.pid).children()
        deadline_s = time.monotonic() + TIMEOUT_S
        while launcher.status() != psutil.STATUS_ZOMBIE:  # its parent is suspended and does not reap it
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the command and all its processes, as a lost machine would; wait until they are gone."""
        processes = [psutil.Process(self._process.pid)]
        processes += processes[0].children(recursive=True)
        assert len(processes) >= 4, "the command, the launcher and two ranks"
        for process in processes:
            process.kill()
        self._process.communicate()
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive


def _begin(preexec: Callable[[], None] | None) -> None:
    # A suspended run whose test failed would never end by itself.
    die_with_parent()
    if preexec is not None:
        preexec()


class Ended:
    """The output of a command that has ended, and the files that it left."""

    def __init__(self, run_dir: Path, code: int, stdout: str, stderr: str) -> None:
        self.run_dir, self.stdout, self.stderr, self._code = run_dir, stdout, stderr, code

    @property
    def reason(self) -> str:
        """Return the only reason on stderr; the line after it says that the run ended early."""
        reason, end = self.stderr.splitlines()
        assert end.startswith(f"turnout: the run ended early, exit code {self._code}"), self.stderr
        return reason.removeprefix("turnout: ")

    def checkpoint(self, step: int) -> Path:
        return checkpoint_path(self.run_dir, step)


def kill_at(started: Started, fault: Fault, *, saved_step: int) -> Path:
    """Kill a run that a fault holds, once this step is saved; return its directory."""
    started.wait_for(Path(fault.mark), checkpoint_path(started.run_dir, saved_step))
    started.kill()
    return started.run_dir


def copy_run(run_dir: Path, name: str) -> Path:
    return Path(shutil.copytree(run_dir, run_dir.with_name(name)))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def n_fired(fault: Fault) -> int:
    return len(Path(fault.mark).read_text().splitlines()) if Path(fault.mark).exists() else 0


@cache
def samples_of(place: Path, data_step: int) -> list[int]:
    """Return the ids of the samples of a data step."""
    cfg = load_config(str(place / "run.toml"), [])
    ids = build_loader(cfg, open_corpus(place / "corpus", verify="size")).batch(data_step).sample_ids
    assert len(ids) == BATCH_SEQS
    return ids.tolist()


def fault_at(place: Path, kind: str, data_step: int, name: str) -> Fault:
    """Return a fault at a data step. It hits the batch's last sample but one, which is the last rank's."""
    return Fault(kind, samples_of(place, data_step)[-2], str(place / f"{name}-{kind}-{data_step}.mark"))  # type: ignore[arg-type]


def samples_seen(seen: Path, n_steps: int) -> list[list[int]]:
    """Return the ids of the samples that all ranks trained on in each step, sorted."""
    ranks = []
    for path in seen.iterdir():
        ids = [sample_id for line in path.read_text().splitlines() for sample_id in json.loads(line)]
        ranks.append(np.array(ids).reshape(n_steps, -1))
    # Ranks of one tensor-parallel group see the same sequences.
    return [np.unique(step).tolist() for step in np.concatenate(ranks, axis=1)]


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of a complete run, one per step, without measured times and memory."""
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, N_STEPS + 1))
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "mem/"))} for row in rows]


def check_tensorboard(run_dir: Path) -> None:
    """Check that TensorBoard has each row of metrics.jsonl, and nothing else."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = read_rows(run_dir)
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/tokens_seen", "eval/loss"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(row["step"], float(torch.tensor(row[name]))) for row in rows if name in row]
        assert shown == wanted, name


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return every tensor of every file as it was written, by file and key."""
    return {
        f"{path.name}:{key}": tensor
        for path in sorted(checkpoint.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def check_same_tensors(got: Path, want: Path) -> None:
    """Check that two checkpoints of one layout are bitwise equal, and that no kind of tensor is all zero."""
    got_tensors, want_tensors = stored_tensors(got), stored_tensors(want)
    check_equal(got_tensors, want_tensors)
    for kind in ("/master/", "/exp_avg/", "/exp_avg_sq/", "router"):
        held = [t for name, t in want_tensors.items() if kind in f"/{name.replace(':', '/')}"]
        assert held and any(tensor.any() for tensor in held), kind


def check_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    differing = [name for name in want if not torch.equal(got[name], want[name])]
    assert not differing, differing
    assert all(tensor.isfinite().all() for tensor in want.values())
