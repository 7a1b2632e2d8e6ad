"""`turnout prepare`, `train` and `doctor` on the command line; launch/cli/main.py registers them."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turnout.launch.cli.parameters import Overrides, Recipe, TextField
from turnout.launch.ranks.hostfile import read_hosts
from turnout.launch.settings import load_config
from turnout.training.errors import ConfigError


def prepare(
    *inputs: Annotated[
        str, Parameter(help="PATH or NAME=PATH: a file, or a directory that is searched for files.")
    ],
    out: Annotated[
        Path, Parameter(help="Directory for the corpus. If killed, run the same command again to continue.")
    ],
    embedded: Annotated[
        bool,
        Parameter(negative=(), help="Use this Python's standard library as the text, in place of inputs."),
    ] = False,
    weight: Annotated[
        tuple[str, ...],
        Parameter(help="NAME=W: the source's weight in training; repeat for each. Default: by tokens."),
    ] = (),
    tokenizer: Annotated[
        Path | None, Parameter(help="A tokenizer.model or tokenizer.json; default: train a tokenizer.")
    ] = None,
    vocab_size: Annotated[
        int | None, Parameter(help="Vocabulary size of the trained tokenizer; default: 32768.")
    ] = None,
    text_field: TextField = None,
    valid_frac: Annotated[
        float, Parameter(help="Fraction of the documents held out for evaluation, 0 to 1.")
    ] = 0.01,
    workers: Annotated[int | None, Parameter(help="Processes that tokenise; default: one per core.")] = None,
) -> None:
    """Turn text (txt, jsonl, parquet, also .gz .bz2 .xz .zst) into a tokenised corpus for `turnout train`.

    Example: turnout prepare web=crawl/ code=src.jsonl.zst --weight web=0.7 --weight code=0.3 --out
    corpora/mix
    """
    # Imported here because numpy and the tokenizers take time, and --help need not wait for them.
    from turnout.launch.commands.prepare import run_prepare

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


def train(
    recipe: Recipe,
    /,
    *,
    run_dir: Annotated[
        Path | None, Parameter(help="Directory for everything that the run writes; required to train.")
    ] = None,
    nproc: Annotated[
        int | None, Parameter(help="Ranks on this machine, one per GPU or CPU process; default: 1.")
    ] = None,
    hostfile: Annotated[
        Path | None,
        Parameter(help="File of machines to train on, with lines NAME slots=RANKS; pdsh and ssh reach them."),
    ] = None,
    overrides: Overrides = (),
    resume: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Resume from the newest intact checkpoint in --run-dir, or start if there is no run yet.",
        ),
    ] = False,
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(
            help="With --resume: a setting, such as optim.lr, that may differ from before; may be repeated."
        ),
    ] = (),
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Print what the run needs (memory, data, disk), and start nothing.")
    ] = False,
) -> None:
    """Train a model from a recipe, on this machine or on the machines of a hostfile.

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
    # Imported here, as below: an error is reported before slow imports, and a run imports no model.
    if dry_run:
        from turnout.launch.commands.dry_run import plan_run

        plan_run(cfg, nproc=nproc * (len(hosts.names) if hosts else 1))
        return
    if run_dir is None:
        raise ConfigError("--run-dir is required; name a new directory, for example --run-dir runs/first")
    from turnout.launch.commands.train import start_run

    code = start_run(
        cfg,
        run_dir=run_dir,
        nproc=nproc,
        is_resumed=resume,
        allowed_changes=allow_change,
        hosts=hosts,
    )
    sys.exit(code)


def doctor(
    recipe: Recipe,
    /,
    *,
    nproc: Annotated[
        int, Parameter(help="CPU ranks to lay out; sizes that divide this number are tried.")
    ] = 2,
    layouts: Annotated[
        tuple[str, ...],
        Parameter(
            help="Only these layouts, such as tp=2,ep=4; default: all that fit.", consume_multiple=True
        ),
    ] = (),
    overrides: Overrides = (),
) -> None:
    """Review a config, and check that every parallel layout trains it exactly as one process does.

    Example: turnout doctor tiny --nproc 4 --set model.balance.scope=batch --layouts tp=1,ep=4 tp=1,ep=2
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1; use the number of ranks to lay out")
    cfg = load_config(recipe, overrides)
    from turnout.launch.commands.doctor import examine

    sys.exit(examine(cfg, nproc=nproc, layouts=layouts))
