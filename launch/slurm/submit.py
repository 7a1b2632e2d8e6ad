"""`turnout submit`: check everything that can be checked here, write the job's files, and submit the job.

What the job does when it runs is in launch/slurm/job.py.
"""

import re
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from turnout.data.corpus import Corpus
from turnout.launch.arguments import check_at_least
from turnout.launch.exit_codes import DONE, OTHER
from turnout.launch.preflight import check_corpus
from turnout.launch.ranks.attempt import is_finished, nothing_left, resume_run
from turnout.launch.ranks.attempt_dir import make_numbered
from turnout.launch.ranks.attempt_records import read_attempts
from turnout.launch.run_dir import SUBMISSIONS, create_run_dir, has_run
from turnout.launch.settings import check_setting_paths, to_toml
from turnout.launch.slurm.batch_script import (
    ENV_FILE,
    SCRIPT_FILE,
    TEMPLATES,
    JobRequest,
    job_script,
    node_range,
    parse_options,
    parse_srun_options,
    time_limit_s,
)
from turnout.launch.slurm.client import SlurmError, find_job, jobs_of, run_command, sbatch
from turnout.launch.slurm.elastic import fit_to_nodes
from turnout.launch.slurm.submission import PASSED, Submission, snapshot, write_submission
from turnout.launch.slurm.time_limit import measured_margin_s
from turnout.training.checkpoint.directory import checkpoint_bytes
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError, printable

PREFLIGHT_TIME = "10"  # minutes
PREFLIGHT_OUTPUT, PREFLIGHT_POLL_S = "preflight.out", 2


@dataclass(frozen=True)
class SubmitOptions:
    """The command line's options, except those that change the recipe."""

    run_dir: Path
    nodes: str
    time: str
    gpus_per_node: int | None
    ranks_per_node: int | None
    allowed_changes: tuple[str, ...]
    sbatch_options: tuple[str, ...]
    srun_options: tuple[str, ...]
    env_file: Path | None
    warn_s: int
    max_failures: int
    chain: int | None
    is_shared: bool
    is_preflight: bool
    is_dry: bool


def submit_run(recipe_cfg: RunConfig, options: SubmitOptions) -> int:
    """Submit a run, or only print the batch script; return the exit code.

    Raises ConfigError if the run does not fit on the nodes, or if a job of this run waits or runs.
    """
    check_setting_paths("--allow-change", options.allowed_changes)
    cfg = with_absolute_corpus(recipe_cfg)
    ranks_per_node = check_options(options)
    run_dir = options.run_dir.absolute()
    submission = run_dir / SUBMISSIONS / "submit-00001"
    request = JobRequest(
        run_dir=run_dir,
        submission=submission,
        python=Path(sys.executable),
        nodes=options.nodes,
        time=PREFLIGHT_TIME if options.is_preflight else options.time,
        warn_s=min(60, options.warn_s) if options.is_preflight else options.warn_s,
        gpus_per_node=options.gpus_per_node,
        is_shared=options.is_shared,
        is_requeued=options.chain is None and not options.is_preflight,
        options=parse_options("--sbatch", options.sbatch_options),
    )
    script = job_script(request)
    _, n_nodes = node_range(options.nodes)
    n_fit, fitted = fit_to_nodes(cfg, n_nodes, ranks_per_node)
    if n_fit < n_nodes:
        if "-" not in options.nodes:
            raise ConfigError(
                f"--nodes {n_nodes}: the batch and the layout fit on {n_fit} nodes, the others would idle; "
                f"use {n_fit}, or 1-{n_nodes} for the most that fit"
            )
        print(f"{n_fit} of {n_nodes} nodes would be used: the batch and the layout do not fit on more")
    if options.is_dry:
        print(script, end="")
        return DONE
    corpus = check_corpus(cfg)
    check_margin(run_dir, options.warn_s)
    check_script(script)
    if (jobs := jobs_of(run_dir)) and not options.is_preflight:
        raise ConfigError(
            f"--run-dir {run_dir}: job {jobs[0].job_id} of this run is {jobs[0].state.lower()}; wait "
            f"for it, or end it: scancel {jobs[0].job_id}"
        )
    if not options.is_preflight and not begin_or_resume(options, fitted, corpus, n_fit * ranks_per_node):
        return DONE
    request = replace(request, submission=make_numbered(run_dir / SUBMISSIONS, "submit"))
    write_files(request, cfg, options, ranks_per_node)
    return submit_jobs(request, options)


def begin_or_resume(options: SubmitOptions, cfg: RunConfig, corpus: Corpus, n_ranks: int) -> bool:
    """Make the run directory, or prepare it for resuming; return whether any step is left to train."""
    run_dir = options.run_dir.absolute()
    if not has_run(run_dir):
        create_run_dir(run_dir, cfg, corpus, nproc=n_ranks)
        return True
    newest = resume_run(run_dir, cfg, corpus, nproc=n_ranks, allowed_changes=options.allowed_changes)
    if newest is None or not is_finished(*newest, cfg):
        return True
    print(nothing_left(run_dir, cfg))
    return False


def with_absolute_corpus(cfg: RunConfig) -> RunConfig:
    """Return the config with the corpus as an absolute path, because a job runs in its run directory."""
    corpus = str(Path(cfg.data.corpus).absolute())
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"corpus": corpus})})


def check_options(options: SubmitOptions) -> int:
    """Return the ranks per node. Raises ConfigError if options are wrong or contradict each other."""
    gpus, ranks = options.gpus_per_node, options.ranks_per_node
    n_ranks = gpus if gpus is not None else ranks
    if n_ranks is None or None not in (gpus, ranks):
        raise ConfigError(
            "name either --gpus-per-node N, for one rank per GPU, or --ranks-per-node N, for CPU ranks"
        )
    counts = {"--gpus-per-node": gpus, "--ranks-per-node": ranks, "--chain": options.chain}
    check_at_least(1, {**counts, "--max-failures": options.max_failures})
    if options.chain is not None and options.is_preflight:
        raise ConfigError("--chain has no effect with --preflight; drop one")
    if options.env_file is not None and not options.env_file.is_file():
        raise ConfigError(f"--env-file {options.env_file}: there is no such file; check the path")
    if options.env_file is not None:
        read_env_file(options.env_file)
    parse_srun_options(options.srun_options)
    if bad := re.search(r"[%\\\x00-\x1f]", str(options.run_dir.absolute())):
        raise ConfigError(
            f"--run-dir {printable(str(options.run_dir))}: SLURM cannot run a job in a path with {bad[0]!r}; "
            "name another directory"
        )
    if options.run_dir.exists() and not options.run_dir.is_dir():
        raise ConfigError(f"--run-dir {options.run_dir} is a file; name a directory")
    return n_ranks


def read_env_file(path: Path) -> str:
    """Return the text of a site's file of variables. Raises ConfigError if bash cannot read it."""
    try:
        text = path.read_text(encoding="utf-8")
        run_command("bash", "-n", str(path))
    except (UnicodeDecodeError, SlurmError) as err:
        raise ConfigError(f"--env-file {path}: bash cannot read it: {err}") from err
    return text


def check_script(script: str) -> None:
    """Have bash and SLURM check the script, before anything is written to the run directory."""
    with tempfile.TemporaryDirectory(prefix="turnout-submit-") as name:
        path = Path(name) / SCRIPT_FILE
        path.write_text(script, encoding="utf-8")
        run_command("bash", "-n", str(path))
        sbatch(path, Path(name), "--test-only")


def check_margin(run_dir: Path, warn_s: int) -> None:
    """Check the warning against the steps and saves of this run. Raises ConfigError if it comes too late."""
    margin_s = measured_margin_s([record.directory for record in read_attempts(run_dir)])
    if margin_s is not None and warn_s < margin_s:
        raise ConfigError(
            f"--warn-s {warn_s} is below the {margin_s:.0f} s that the longest step and save of this run "
            f"need; use at least {margin_s:.0f}"
        )


def write_files(request: JobRequest, cfg: RunConfig, options: SubmitOptions, ranks_per_node: int) -> None:
    """Write everything that the job needs to the submission's directory."""
    directory = request.submission
    own = (TEMPLATES / ENV_FILE).read_text(encoding="utf-8")
    if options.env_file is not None:
        # First, because turnout's own file keeps variables that are already set.
        own = read_env_file(options.env_file) + "\n" + own
    (directory / ENV_FILE).write_text(own, encoding="utf-8")
    (directory / SCRIPT_FILE).write_text(job_script(request), encoding="utf-8")
    versions = snapshot(directory, to_toml(cfg))
    submission = Submission(
        ranks_per_node=ranks_per_node,
        has_gpus=options.gpus_per_node is not None,
        warn_s=request.warn_s,
        max_failures=options.max_failures,
        n_bytes=checkpoint_bytes(cfg.model),
        allowed_changes=options.allowed_changes,
        srun_options=parse_srun_options(options.srun_options),
        is_chain=options.chain is not None,
        is_preflight=options.is_preflight,
        **versions,  # type: ignore[arg-type]
    )
    write_submission(directory, submission)


def submit_jobs(request: JobRequest, options: SubmitOptions) -> int:
    """Submit the job, or the jobs of a chain, and print how to follow it.

    Raises ConfigError if SLURM refuses a job; the jobs of a chain that it has already accepted are named.
    """
    (request.run_dir / "logs").mkdir(exist_ok=True)
    script, run_dir = request.submission / SCRIPT_FILE, request.run_dir
    if options.is_preflight:
        return preflight(script, run_dir)
    job_ids: list[str] = []
    for _ in range(options.chain or 1):
        after = [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else []
        try:
            job_ids.append(sbatch(script, run_dir, *after))
        except ConfigError as err:
            if not job_ids:
                raise
            raise ConfigError(
                f"{err}; of the chain, {', '.join(job_ids)} was submitted before: let that run, or end it: "
                f"scancel {' '.join(job_ids)}"
            ) from err
    limit_s = time_limit_s(request.time)
    print(
        f"submitted job {', '.join(job_ids)}: {request.nodes} nodes for {limit_s / 3600:.3g} h, {script}\n"
        f"to follow it: turnout status {run_dir}"
    )
    return DONE


def preflight(script: Path, run_dir: Path) -> int:
    """Submit a job that only checks its nodes, wait for it, and print its output."""
    directory = script.parent
    job_id = sbatch(script, directory, f"--output={PREFLIGHT_OUTPUT}")
    print(f"preflight job {job_id} checks the nodes for {run_dir}", flush=True)
    before = ""
    while (job := find_job(job_id)) is not None:
        if (state := f"{job.state.lower()} ({job.reason})") != before and job.state == "PENDING":
            print(f"the job waits: {state}", flush=True)
        before = state
        time.sleep(PREFLIGHT_POLL_S)
    output = directory / PREFLIGHT_OUTPUT
    print(
        output.read_text(encoding="utf-8") if output.exists() else f"the job has written no {output}", end=""
    )
    return DONE if (directory / PASSED).exists() else OTHER
