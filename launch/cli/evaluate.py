"""The commands that ask a trained model: how well it predicts, and which experts it uses."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from turnout.launch.verify import check_is_model

Model = Annotated[
    Path, Parameter(help="A run (its newest intact checkpoint), a checkpoint, or an exported model.")
]
Split = Annotated[
    Literal["train", "valid"] | None, Parameter(help="Which part of the corpus; default: valid.")
]
TextField = Annotated[
    str | None, Parameter(help="Field that holds the text in jsonl and parquet; default: text.")
]
DType = Annotated[Literal["float32", "bfloat16"], Parameter(help="What the model computes in.")]
MaxDocuments = Annotated[int | None, Parameter(help="Only so many, taken from the sources in turn.")]
Microbatch = Annotated[int, Parameter(help="Sequences that the model takes at once.")]


def evaluate(
    model: Model,
    /,
    *texts: Annotated[str, Parameter(help="PATH or NAME=PATH: txt, jsonl, parquet, also compressed.")],
    corpus: Annotated[
        Path | None, Parameter(help="A corpus of `turnout prepare` with the model's tokenizer.")
    ] = None,
    split: Split = None,
    text_field: TextField = None,
    max_documents: MaxDocuments = None,
    microbatch_seqs: Microbatch = 8,
    dtype: DType = "float32",
    out: Annotated[
        Path | None, Parameter(help="FILE.json or FILE.jsonl for the numbers of each document.")
    ] = None,
) -> None:
    """Loss, perplexity and bits per byte of texts, by source and in total.

    Each document is scored alone, bos first, each of its tokens once, in windows of seq_len tokens that do
    not overlap in what they score; the last window keeps a full context. Its bits are divided by the UTF-8
    bytes of its text. This is lm-eval's rolling log-likelihood with add_bos_token=False.

    Example: turnout evaluate runs/first prose=docs/ code=src.jsonl.gz --out scores.json
    """
    check_is_model(model)
    # Imported here, as below, because torch takes a second to import; --help and refusals do without.
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
    tasks: Annotated[str, Parameter(help="Names of tasks or groups, separated by commas.")],
    include_path: Annotated[Path | None, Parameter(help="Directory with YAML of tasks of your own.")] = None,
    limit: Annotated[int | None, Parameter(help="Only the first so many documents of each task.")] = None,
    num_fewshot: Annotated[
        int | None, Parameter(help="Examples before each question; default: the task's.")
    ] = None,
    microbatch_seqs: Microbatch = 8,
    dtype: DType = "float32",
    out: Annotated[Path | None, Parameter(help="FILE.json for the results and each sample.")] = None,
) -> None:
    """Tasks of the lm-evaluation-harness; needs pip install 'turnout[lm-eval]'.

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
    text: Annotated[str | None, Parameter(help="Some words, in quotes.")] = None,
    /,
    *,
    corpus: Annotated[
        Path | None, Parameter(help="A corpus of `turnout prepare`, whose documents are counted instead.")
    ] = None,
    split: Split = None,
    max_documents: MaxDocuments = None,
    microbatch_seqs: Microbatch = 8,
    dtype: DType = "float32",
    out: Annotated[
        Path | None, Parameter(help="Of a text: a figure, FILE.svg or FILE.png. Of a corpus: a directory.")
    ] = None,
) -> None:
    """Which experts each token of a text takes, layer by layer; or which tokens the experts of a corpus get.

    Of a text: one row per token, one column per expert layer, with ids and weights of its experts. Of a
    corpus: the share of each expert's rows by source and by class of token, against that of all tokens.

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
