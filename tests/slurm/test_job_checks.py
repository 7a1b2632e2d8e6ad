"""What stops a job before its ranks start, and what must never reach a shell; on a real cluster."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.slurm.lab import JobRun, Lab, wait_for
from turnout.launch.ranks.attempt_records import Ending

ONE_RANK = ["--set", "parallel.ep=1", "--set", "train.n_steps=40"]


def ending(run: JobRun, n: int) -> Ending:
    found = run.attempts[n - 1].ending
    assert found is not None
    return found


def test_one_node_trains_under_slurm_whatever_its_names_contain(lab: Lab) -> None:
    """The smoke test, with a directory's name and a prompt that would run commands if a shell read them."""
    hacked = lab.place / "hacked"
    name = f"-a b'\"$(touch {hacked.name});`touch {hacked.name}`|*"
    prompts = f'sample.prompts=["$(touch {hacked}) `touch {hacked}`"]'
    submit = ["submit", "run.toml", f"--run-dir={name}", "--nodes", "1", "--ranks-per-node", "1", "--shared"]
    said = lab.turnout(*submit, "--time", "10", "--warn-s", "60", *ONE_RANK, "--set", prompts)
    run = JobRun(lab, lab.place / name, [said.split("submitted job ")[1].split(":")[0]])
    log = run.wait_until_gone()
    assert ending(run, 1).kind == "done", log
    assert run.newest_step() == 40
    assert not list(lab.place.rglob(hacked.name))
    assert "sample" in (run.attempts[0].directory / "node-n1.log").read_text()


def test_a_refused_job_leaves_nothing(lab: Lab) -> None:
    submit = ["submit", "run.toml", "--run-dir", "refused", *ONE_RANK, "--ranks-per-node", "1", "--nodes"]
    said = lab.turnout(*submit, "9", "--set", "train.batch_tokens=2304", code=2)
    assert re.search(r"SLURM does not take the job: .*(more than available|not available)", said), said
    said = lab.turnout(*submit, "1", "--sbatch", "partition=nowhere", code=2)
    assert "invalid partition" in said
    said = lab.turnout(*submit, "1", "--sbatch", "partition=main\n#SBATCH --uid=0", code=2)
    assert "has a character that a batch script cannot hold" in said
    for name in ("new\nline", "%j", "back\\slash"):
        submit[3] = name
        assert "SLURM cannot run a job in a path with" in lab.turnout(*submit, "1", code=2)
    assert not any((lab.place / name).exists() for name in ("refused", "new\nline", "%j", "back\\slash"))


def test_a_dry_run_prints_what_bash_understands(lab: Lab) -> None:
    submit = ["submit", "run.toml", "--run-dir", "dry", "--nodes", "2", "--ranks-per-node", "2", "--dry-run"]
    script = lab.turnout(*submit)
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=dry\n")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not (lab.place / "dry").exists()


def test_a_preflight_passes_on_good_nodes_and_names_bad_ones(lab: Lab) -> None:
    preflight = ["submit", "run.toml", "--run-dir", "site", "--nodes", "2", "--preflight", "--shared"]
    said = lab.turnout(*preflight, "--ranks-per-node", "2")
    assert re.search(r"4 ranks: sums are right, [\d.]+ GB/s for 64 MiB", said), said
    assert "n1, n2: all is well" in said
    # The cluster's GPUs are device files without a driver, so torch sees none of them.
    said = lab.turnout(*preflight, "--gpus-per-node", "2", code=1)
    assert "node n1, n2: torch sees 0 GPUs, not 2" in said
    assert not (lab.place / "site" / "config.toml").exists(), "no run was begun"


@pytest.mark.long
def test_a_node_that_comes_back_with_other_packages_is_excluded(lab: Lab, tmp_path: Path) -> None:
    run = lab.submit("packages")
    run.wait_for_progress(1)
    real = Path(str(metadata.distribution("numpy").locate_file("."))).resolve()
    (installed,) = real.glob("numpy-*.dist-info")
    fake = tmp_path / "METADATA"
    shutil.copyfile(installed / "METADATA", fake)
    fake.write_text(re.sub(r"(?m)^Version: .*", "Version: 9.9.9", fake.read_text(), count=1))
    bad = run.attempts[0].begin.nodes[1]
    lab.in_node(bad, "mount", "--bind", str(fake), str(installed / "METADATA"))
    try:
        lab.run("scontrol", "requeue", run.job_id)
        run.wait_for_progress(3)
        run.cancel()
    finally:
        lab.in_node(bad, "umount", str(installed / "METADATA"))
    assert (ending(run, 2).kind, ending(run, 2).nodes) == ("unfit", (bad,)), run.log
    assert ending(run, 2).reasons == (f"node {bad}: has numpy 9.9.9, not {metadata.version('numpy')}",)
    assert not list(run.attempts[1].directory.glob("*.flight")), "no rank was started"
    assert bad not in run.attempts[2].begin.nodes


def test_a_missing_corpus_is_no_nodes_fault(lab: Lab) -> None:
    shutil.copytree(lab.place / "corpus", lab.place / "lost")
    run = lab.submit(
        "no-corpus", *ONE_RANK, "--set", "data.corpus=lost", "--sbatch", "begin=now+5", nodes="1"
    )
    shutil.rmtree(lab.place / "lost")
    log = run.wait_until_gone()
    (attempt,) = run.attempts
    assert attempt.ending is not None and (attempt.ending.action, attempt.ending.code) == ("stop", 3), log
    assert "lost" in attempt.ending.reasons[0]


def test_a_job_is_requeued_even_if_a_node_cannot_be_excluded(lab: Lab) -> None:
    sleeping = lab.run(
        "sbatch", "--parsable", "--requeue", "--output=/dev/null", "--wrap", "sleep 60"
    ).strip()
    wait_for(lambda: "RUNNING" in lab.run("scontrol", "show", "job", sleeping), "the job")
    code = f"from turnout.launch.slurm.client import requeue; print(requeue('{sleeping}', ['nowhere']))"
    said = lab.run(sys.executable, "-c", code)
    assert said.startswith("requeued, but not away from nowhere: "), said
    # Not PENDING: it may still be ending, or already run again.
    wait_for(lambda: "Restarts=1" in lab.run("scontrol", "show", "job", sleeping), "the job to be requeued")


@pytest.mark.long
def test_a_crash_loop_stops_with_its_reason(lab: Lab, tmp_path: Path) -> None:
    """A fabric variable names no interface, so each attempt fails in the same way before its first step."""
    site = tmp_path / "site.env"
    site.write_text("export GLOO_SOCKET_IFNAME=nowhere0\n")
    run = lab.submit("loop", "--env-file", str(site))
    log = run.wait_until_gone()
    assert [ending(run, n).action for n in (1, 2)] == ["requeue", "stop"] and len(run.attempts) == 2, log
    assert "the same failure at step 0 twice: stopped" in log
    assert "nowhere0" in log
    assert run.state() == "FAILED"
    shown = lab.turnout("status", "loop")
    assert re.search(r"^failure +attempt-00002: .*nowhere0", shown, re.MULTILINE), shown


@pytest.mark.long
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(lab: Lab) -> None:
    small = lab.place / "small"
    run = lab.submit("small/full")
    run.wait_for_progress(1)
    with (small / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    try:
        run.wait_for(lambda: run.state() == "FAILED", "the end")
        log = run.log
    finally:
        (small / "filler").unlink()
    saved = run.newest_step()
    lab.turnout("checkpoint", "verify", str(run.run_dir))
    assert not list((run.run_dir / "checkpoints").glob("*.tmp")), log
    assert "No space left on device" in log or "GiB free, and a checkpoint takes" in log
    run.finish()
    assert run.attempts[-1].begin.from_step == saved
