"""`turnout evaluate`, `lm-eval` and `experts` on the command line; launch/cli/main.py registers them."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from turnout.launch.cli.parameters import DType, Model, TextField
from turnout.launch.verify import check_is_model

Split = Annotated[
    Literal["train", "valid"] | None, Parameter(help="Which split of the corpus; default: valid.")
]
MaxDocuments = Annotated[
    int | None, Parameter(help="Read at most this many documents, in turn from each source; default: all.")
]
Microbatch = Annotated[int, Parameter(help="Sequences per forward pass.")]


def evaluate(
    model: Model,
    /,
    *texts: Annotated[
        str,
        Parameter(help="PATH or NAME=PATH: a file or directory of txt, jsonl or parquet, also compressed."),
    ],
    corpus: Annotated[
        Path | None, Parameter(help="A prepared corpus with the model's tokenizer, in place of texts.")
    ] = None,
    split: Split = None,
    text_field: TextField = None,
    max_documents: MaxDocuments = None,
    microbatch_seqs: Microbatch = 8,
    dtype: DType = "float32",
    out: Annotated[
        Path | None, Parameter(help="FILE.json or FILE.jsonl for the results of each document.")
    ] = None,
) -> None:
    """Compute loss, perplexity and bits per byte of texts, by source and in total.

    Each document is scored alone, after bos, in windows of seq_len tokens. Each token is scored once; the
    last window starts early enough to be full. Bits are divided by the UTF-8 bytes of the text. This is
    lm-eval's rolling log-likelihood with add_bos_token=False.

    Example: turnout evaluate runs/first prose=docs/ code=src.jsonl.gz --out scores.json
    """
    check_is_model(model)
    # Imported here, as below, because torch takes a second to import; --help and errors need not wait.
    from turnout.launch.commands.evaluate import run_evaluate

    run_evaluate(
        model,
        texts,
        corpus=corpus,
        split=split,
        text_field=text_field,
        max_documents=max_documents,
        microbatch_seqs=microbatch_seqs,
        dtype=dtype,
        out=out,
    )


def lm_eval(
    model: Model,
    /,
    *,
    tasks: Annotated[str, Parameter(help="Names of lm-eval tasks or groups, separated by commas.")],
    include_path: Annotated[
        Path | None,
        Parameter(help="Directory with the YAML files of your own tasks. Their code is executed."),
    ] = None,
    limit: Annotated[
        int | None, Parameter(help="Use only this many documents of each task, its first; default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Parameter(help="Examples before each question; default: as the task says.")
    ] = None,
    microbatch_seqs: Microbatch = 8,
    dtype: DType = "float32",
    out: Annotated[Path | None, Parameter(help="FILE.json for the results and samples.")] = None,
) -> None:
    """Run tasks of the lm-evaluation-harness; needs pip install 'turnout[lm-eval]'.

    Example: turnout lm-eval runs/first --tasks own_words --include-path tasks/ --limit 100
    """
    check_is_model(model)
    from turnout.launch.commands.lm_eval import run_lm_eval

    run_lm_eval(
        model,
        tasks=tasks,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        microbatch_seqs=microbatch_seqs,
        dtype=dtype,
        out=out,
    )


def experts(
    model: Model,
    text: Annotated[str | None, Parameter(help="The text to show, in quotes.")] = None,
    /,
    *,
    corpus: Annotated[
        Path | None, Parameter(help="Count over a prepared corpus, in place of a text.")
    ] = None,
    split: Split = None,
    max_documents: MaxDocuments = None,
    microbatch_seqs: Microbatch = 8,
    dtype: DType = "float32",
    out: Annotated[
        Path | None,
        Parameter(help="For a text: a figure, FILE.svg or FILE.png. For a corpus: a directory, required."),
    ] = None,
) -> None:
    """Show which experts the tokens of a text use, or what the experts specialise in over a corpus.

    For a text: one row per token and one column per expert layer, with the ids and weights of the experts.
    For a corpus: what share of each expert's rows comes from each source and token class, compared with
    their share of all tokens.

    Example: turnout experts runs/first "def add(a, b): return a + b" --out routes.svg
    """
    check_is_model(model)
    from turnout.launch.commands.experts import run_experts

    run_experts(
        model,
        text,
        corpus=corpus,
        split=split,
        max_documents=max_documents,
        microbatch_seqs=microbatch_seqs,
        dtype=dtype,
        out=out,
    )
