"""`turnout generate` on the command line; launch/cli/main.py registers it."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from turnout.launch.cli.parameters import DType, Model
from turnout.launch.verify import check_is_model


def generate(
    path: Model,
    /,
    *prompts: Annotated[str, Parameter(help="Texts to continue; without any, stdin is one prompt.")],
    prompt_file: Annotated[
        tuple[Path, ...],
        Parameter(help="A file with one more prompt; its last newline is dropped. May be repeated."),
    ] = (),
    max_tokens: Annotated[int, Parameter(help="Maximum length of each continuation, in tokens.")] = 256,
    temperature: Annotated[
        float, Parameter(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[int | None, Parameter(help="Sample from the K most likely tokens.")] = None,
    top_p: Annotated[
        float | None, Parameter(help="Sample from the most likely tokens whose probabilities add up to P.")
    ] = None,
    min_p: Annotated[
        float | None, Parameter(help="Sample from tokens at least M times as likely as the most likely one.")
    ] = None,
    seed: Annotated[
        int, Parameter(help="Random seed; text i of the command, counted from 0, uses seed + i.")
    ] = 0,
    stop: Annotated[tuple[str, ...], Parameter(help="End a text before this string; may be repeated.")] = (),
    n_samples: Annotated[int, Parameter(help="Number of continuations of each prompt.")] = 1,
    dtype: DType = "float32",
    device_map: Annotated[
        Literal["auto"] | None,
        Parameter(help="auto: spread a model larger than one device over GPUs, memory and disk (in TMPDIR)."),
    ] = None,
    max_memory: Annotated[
        str | None,
        Parameter(
            help="Like --device-map auto, with at most this much for the weights on each GPU, such as 20GiB, "
            "or in memory if there is no GPU."
        ),
    ] = None,
    no_stream: Annotated[
        bool, Parameter(negative=(), help="Print a text once it is finished, not token by token.")
    ] = False,
) -> None:
    """Continue texts with a trained model.

    Prompt and continuation together are limited to the model's seq_len tokens, unless it has a sliding
    window. No tokens are dropped, even if training had a capacity factor.
    Only the continuations go to stdout.

    Example: turnout generate runs/first "import os" --max-tokens 64
    """
    check_is_model(path)
    # Imported here because torch takes a second to import; --help and errors need not wait for it.
    from turnout.launch.commands.generate import Placement, build_options, read_prompts, write_texts
    from turnout.training.generation.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options = build_options(sampling, max_tokens=max_tokens, seed=seed, n_samples=n_samples, stop=stop)
    placement = Placement.of(dtype, is_spread=device_map is not None, max_memory=max_memory)
    write_texts(path, read_prompts(prompts, prompt_file), options, placement, is_streamed=not no_stream)
