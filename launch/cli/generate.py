"""`turnout generate` on the command line; launch/cli/main.py registers it."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from turnout.launch.verify import check_is_model


def generate(
    path: Annotated[
        Path, Parameter(help="A run directory, for its newest intact checkpoint, a checkpoint or an export.")
    ],
    /,
    *prompts: Annotated[str, Parameter(help="Texts to continue; without one stdin is read.")],
    prompt_file: Annotated[
        tuple[Path, ...],
        Parameter(help="A file that is one more prompt, without its last newline; repeat at will."),
    ] = (),
    max_tokens: Annotated[int, Parameter(help="The most tokens to write for each.")] = 256,
    temperature: Annotated[float, Parameter(help="0 takes the most likely token each time.")] = 0.8,
    top_k: Annotated[int | None, Parameter(help="Draw from the K most likely tokens.")] = None,
    top_p: Annotated[
        float | None, Parameter(help="Draw from the fewest tokens whose probabilities reach P.")
    ] = None,
    min_p: Annotated[
        float | None, Parameter(help="Draw from tokens at least M times as likely as the likeliest.")
    ] = None,
    seed: Annotated[int, Parameter(help="Text i of a command draws from the seed + i.")] = 0,
    stop: Annotated[
        tuple[str, ...], Parameter(help="A string before which a text ends; repeat at will.")
    ] = (),
    n_samples: Annotated[int, Parameter(help="Texts for each prompt.")] = 1,
    dtype: Annotated[
        Literal["float32", "bfloat16"], Parameter(help="What the model computes in.")
    ] = "float32",
    device_map: Annotated[
        Literal["auto"] | None,
        Parameter(help="auto: over GPUs, memory and disk (TMPDIR), for models larger than one device."),
    ] = None,
    max_memory: Annotated[
        str | None,
        Parameter(help="As device-map auto, with so much for weights on each GPU, or in memory: 20GiB."),
    ] = None,
    no_stream: Annotated[
        bool, Parameter(negative=(), help="Print a single text when it is finished, not as it comes.")
    ] = False,
) -> None:
    """Continue texts with a trained model, dropless; a text ends at seq_len tokens unless a window slides.

    Only the continuations go to stdout. Example: turnout generate runs/first "import os" --max-tokens 64
    """
    check_is_model(path)
    # Imported here because torch takes a second to import. --help and refusals need not wait for it.
    from turnout.launch.commands.generate import Placement, options_of, read_prompts, write_texts
    from turnout.training.generation.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options = options_of(sampling, max_tokens=max_tokens, seed=seed, n_samples=n_samples, stop=stop)
    placement = Placement.of(dtype, is_spread=device_map is not None, max_memory=max_memory)
    write_texts(path, read_prompts(prompts, prompt_file), options, placement, is_streamed=not no_stream)
