"""The `turnout` command. Each command is a thin story; the exit codes are in launch/exit_codes.py."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from data.errors import DataError
from launch import cli_evaluate
from launch.cli_generate import generate
from launch.cli_weights import export, import_
from launch.exit_codes import BAD_CONFIG, DONE, OTHER, exit_code
from launch.hostfile import read_hosts
from launch.local import waiting_threads
from launch.settings import load_config
from launch.slurm import SlurmError
from training.errors import CheckpointError, ConfigError, ExportError, printable

app = App(
    name="turnout",
    help="Pretrain Mixture-of-Experts language models; the parallel layout cannot change the result.",
    version=metadata.version("turnout"),
    suppress_keyboard_interrupt=False,  # it would end with 130; main says what happened and ends with 1
)


@app.command
def prepare(
    *inputs: Annotated[str, Parameter(help="PATH or NAME=PATH: a file, or a directory searched for files.")],
    out: Annotated[Path, Parameter(help="Directory of the corpus; run again after a kill to continue.")],
    embedded: Annotated[
        bool, Parameter(negative=(), help="Use this Python's standard library; needs no input.")
    ] = False,
    weight: Annotated[
        tuple[str, ...], Parameter(help="NAME=W, the share of a source in training; repeat for each source.")
    ] = (),
    tokenizer: Annotated[
        Path | None, Parameter(help="tokenizer.model or tokenizer.json to use; else one is trained.")
    ] = None,
    vocab_size: Annotated[
        int | None, Parameter(help="Tokens of the tokenizer that is trained; default: 32768.")
    ] = None,
    text_field: Annotated[
        str | None, Parameter(help="Field that holds the text in jsonl and parquet; default: text.")
    ] = None,
    valid_frac: Annotated[float, Parameter(help="Share of documents held out for evaluation.")] = 0.01,
    workers: Annotated[int | None, Parameter(help="Processes that tokenise; default: all cores.")] = None,
) -> None:
    """Turn text (txt, jsonl, parquet, also .gz .bz2 .xz .zst) into a tokenised corpus for `turnout train`.

    Example: turnout prepare web=crawl/ code=src.jsonl.zst --weight web=0.7 --weight code=0.3 --out
    corpora/mix
    """
    # Imported here because numpy and the tokenizers take time, and --help need not wait for them.
    from launch.prepare import run_prepare

    run_prepare(
        inputs,
        out=out,
        embedded=embedded,
        weights=weight,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        text_field=text_field,
        valid_frac=valid_frac,
        workers=workers,
    )


@app.command
def train(
    recipe: Annotated[str, Parameter(help="Name of a packaged recipe, or a TOML file.")],
    /,
    *,
    run_dir: Annotated[Path | None, Parameter(help="Directory of everything the run writes.")] = None,
    nproc: Annotated[
        int | None, Parameter(help="Ranks on this machine: one per GPU, or CPU processes; default: 1.")
    ] = None,
    hostfile: Annotated[
        Path | None,
        Parameter(help="Machines to train on, as lines NAME slots=RANKS; reached by pdsh and ssh."),
    ] = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
    resume: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Go on from the newest intact checkpoint in --run-dir, or start where there is no run.",
        ),
    ] = False,
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(
            help="With --resume, a setting that may differ from the run's, as optim.lr; repeat at will."
        ),
    ] = (),
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Print what the run needs and start nothing.")
    ] = False,
) -> None:
    """Train a model by a recipe, on the ranks of this machine, or of those of a hostfile.

    Example: turnout train tiny --run-dir runs/first --nproc 2 --set train.n_steps=200 --resume
    """
    if nproc is not None and hostfile is not None:
        raise ConfigError(f"--nproc {nproc} has no effect with --hostfile, whose slots are ranks; drop it")
    hosts = None if hostfile is None else read_hosts(hostfile)
    nproc = hosts.slots if hosts is not None else 1 if nproc is None else nproc
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1; use the number of ranks to start")
    if allow_change and not resume:
        raise ConfigError(
            f"--allow-change {allow_change[0]} has no effect without --resume; add it, or drop this"
        )
    cfg = load_config(recipe, overrides)
    # Imported here, as below: a refusal need not wait for what a run needs, nor a run for the model.
    if dry_run:
        from launch.plan import plan_run

        plan_run(cfg, nproc=nproc * (len(hosts.names) if hosts else 1))
        return
    if run_dir is None:
        raise ConfigError("--run-dir is required; name a new directory, for example --run-dir runs/first")
    from launch.train import start_run

    code = start_run(
        cfg,
        run_dir=run_dir,
        nproc=nproc,
        is_resumed=resume,
        allowed_changes=allow_change,
        hosts=hosts,
    )
    sys.exit(code)


@app.command
def submit(
    recipe: Annotated[str, Parameter(help="Name of a packaged recipe, or a TOML file.")],
    /,
    *,
    run_dir: Annotated[Path, Parameter(help="Directory of everything the run writes, seen by all nodes.")],
    nodes: Annotated[str, Parameter(help="How many nodes, as 8, or 4-8 to go on with what there is.")],
    time: Annotated[str, Parameter(help="Time limit of each life of the job, as 24:00:00.")] = "24:00:00",
    gpus_per_node: Annotated[int | None, Parameter(help="GPUs of each node, with one rank each.")] = None,
    ranks_per_node: Annotated[int | None, Parameter(help="CPU ranks of each node without GPUs.")] = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(help="A setting that may differ from the run's, as optim.lr; repeat at will."),
    ] = (),
    sbatch: Annotated[
        tuple[str, ...], Parameter(help="An option for sbatch, as partition=gpu; repeat at will.")
    ] = (),
    srun: Annotated[
        tuple[str, ...],
        Parameter(help="An option for the ranks' srun, as container-image=turnout.sqsh; repeat at will."),
    ] = (),
    env_file: Annotated[Path | None, Parameter(help="Shell file of the site's own NCCL variables.")] = None,
    warn_s: Annotated[
        int, Parameter(help="Seconds before the time limit at which SLURM warns the job, at the latest.")
    ] = 300,
    max_failures: Annotated[int, Parameter(help="Failures without progress, after which the run stops.")] = 3,
    chain: Annotated[
        int | None, Parameter(help="Submit so many jobs, one after the other, where none may be requeued.")
    ] = None,
    shared: Annotated[bool, Parameter(negative=(), help="Leave other jobs room on the nodes.")] = False,
    preflight: Annotated[
        bool, Parameter(negative=(), help="Only check the nodes, and that their ranks reach one another.")
    ] = False,
    dry_run: Annotated[bool, Parameter(negative=(), help="Print the batch script, submit nothing.")] = False,
) -> None:
    """Submit a run to SLURM; it saves before its limit, is requeued, and goes on until it is finished.

    Example: turnout submit small --run-dir runs/small --nodes 8 --gpus-per-node 8 --time 24:00:00
    """
    cfg = load_config(recipe, overrides)
    from launch.submit import Wanted, submit_run

    wanted = Wanted(
        run_dir=run_dir,
        nodes=nodes,
        time=time,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        allowed_changes=allow_change,
        sbatch_options=sbatch,
        srun_options=srun,
        env_file=env_file,
        warn_s=warn_s,
        max_failures=max_failures,
        chain=chain,
        is_shared=shared,
        is_preflight=preflight,
        is_dry=dry_run,
    )
    sys.exit(submit_run(cfg, wanted))


@app.command
def status(
    run_dir: Annotated[
        Path | None, Parameter(help="What --run-dir named; default: all in the queue.")
    ] = None,
    /,
    *,
    verify: Annotated[bool, Parameter(negative=(), help="Read every byte of the newest checkpoint.")] = False,
) -> None:
    """Show where a run stands: queue, step, loss, speed, time to the end, checkpoint and last failure.

    Example: turnout status runs/small --verify
    """
    from launch.status import show_status

    show_status(run_dir, is_verified=verify)


@app.command
def doctor(
    recipe: Annotated[str, Parameter(help="Name of a packaged recipe, or a TOML file.")],
    /,
    *,
    nproc: Annotated[int, Parameter(help="CPU ranks to lay out; their divisors are tried.")] = 2,
    layouts: Annotated[
        tuple[str, ...],
        Parameter(help="Only these, as tp=2,ep=4; default: all that fit.", consume_multiple=True),
    ] = (),
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
) -> None:
    """Look a config over, and see that every parallel layout trains it exactly as one process does.

    Example: turnout doctor tiny --nproc 4 --set model.balance.scope=batch --layouts tp=1,ep=4 tp=1,ep=2
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1; use the number of ranks to lay out")
    cfg = load_config(recipe, overrides)
    from launch.doctor import examine

    sys.exit(examine(cfg, nproc=nproc, layouts=layouts))


app.command(export)
app.command(import_, name="import")

checkpoint = App(
    name="checkpoint", help="Look at the checkpoints of a run, verify them, and remove old ones."
)
app.command(checkpoint)


@checkpoint.command(name="list")
def list_(run_dir: Annotated[Path, Parameter(help="What --run-dir named.")], /) -> None:
    """List a run's checkpoints, newest first, without reading their tensors.

    Example: turnout checkpoint list runs/first
    """
    from launch.checkpoints import list_saved

    list_saved(run_dir)


@checkpoint.command
def verify(
    directory: Annotated[Path, Parameter(help="A checkpoint, or a run directory for all of its own.")], /
) -> None:
    """Read every byte and compare it with the checksums; exit code 4 where a file is damaged.

    Example: turnout checkpoint verify runs/first/checkpoints/step-00001000
    """
    from launch.checkpoints import verify_all

    verify_all(directory)


@checkpoint.command
def show(
    directory: Annotated[Path, Parameter(help="A checkpoint, or a run directory for its newest one.")],
    /,
    *,
    tensors: Annotated[
        bool, Parameter(negative=(), help="Read the weights: mean, std, min and max of each parameter.")
    ] = False,
) -> None:
    """Show what a checkpoint holds: step, data, layout, optimizer, and each parameter's shape.

    Example: turnout checkpoint show runs/first --tensors
    """
    from launch.checkpoints import show_contents

    show_contents(directory, has_tensors=tensors)


@checkpoint.command
def prune(
    run_dir: Annotated[Path, Parameter(help="What --run-dir named; the run may be going on.")],
    /,
    *,
    keep_last: Annotated[int, Parameter(help="How many of the newest stay.")],
    keep_every_steps: Annotated[int | None, Parameter(help="Those of each so many steps stay, too.")] = None,
    dry_run: Annotated[bool, Parameter(negative=(), help="Only say what would be removed.")] = False,
) -> None:
    """Remove old checkpoints, but never the newest intact one.

    Example: turnout checkpoint prune runs/first --keep-last 2 --keep-every-steps 10000 --dry-run
    """
    from launch.checkpoints import prune_old

    prune_old(run_dir, keep_last=keep_last, keep_every_steps=keep_every_steps, is_dry=dry_run)


app.command(generate)
app.command(cli_evaluate.evaluate)
app.command(cli_evaluate.lm_eval)
app.command(cli_evaluate.routes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; every error a user can cause ends in one line on stderr and its exit code."""
    for name, value in waiting_threads().items():  # before any command imports torch, whose threads look once
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale's encoding may not have a text's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments, exit_on_error=False, print_error=False, console=Console(soft_wrap=True))
    except CycloptsError as err:
        _fail(f"{' '.join(str(err).split())} (`turnout --help` shows the usage)", BAD_CONFIG)
    except (CheckpointError, ConfigError, DataError) as err:
        _fail(str(err), exit_code(err))
    except (SlurmError, ExportError) as err:
        _fail(str(err), OTHER)
    except BrokenPipeError:
        # Who read the output has had enough. What is left of it has nowhere to go, nor at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OTHER)
    except OSError as err:
        where = f"{err.filename}: " if err.filename else ""
        _fail(f"{where}{err.strerror or err}", OTHER)
    except KeyboardInterrupt:
        _fail("interrupted", OTHER)
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError) and type(err).__name__ != "OutOfMemoryError":  # torch's own
            raise
        _fail(f"out of memory: {err}; use a smaller model or batch, or --device-map auto to generate", OTHER)
    sys.exit(DONE)


def _fail(message: str, code: int) -> None:
    # A message may hold the words of a stranger's file, which are not to steer the terminal.
    print(f"turnout: {printable(message, len(message))}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
