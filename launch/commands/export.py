"""`turnout export`: from a checkpoint to files that other programs load, proven before they get a name."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from turnout.data.corpus import Corpus, open_corpus
from turnout.data.errors import DataError
from turnout.data.tokenizer import load_tokenizer
from turnout.launch.console import LiveBar
from turnout.launch.models import load_tokenizer_of, open_weights
from turnout.launch.run_dir import read_config
from turnout.launch.verify import is_checkpoint
from turnout.training.checkpoint.directory import list_checkpoints
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import CONFIG_FILE
from turnout.training.checkpoint.weights import CheckpointWeights, Weights
from turnout.training.errors import ConfigError
from turnout.training.export import client_gguf
from turnout.training.export.architectures import choose_architecture
from turnout.training.export.card import CARD, model_card, origin_of
from turnout.training.export.client_gguf import check_read_back
from turnout.training.export.client_transformers import check_tokenizer, client_name, transformers_logits
from turnout.training.export.gate import (
    HeldOut,
    Rounded,
    check_logits,
    choose_rows,
    held_out_tokens,
    random_tokens,
)
from turnout.training.export.gguf_file import (
    GGUF_FILE,
    KINDS,
    Kind,
    check_gguf,
    gguf_tensors,
    to_stored,
    write_gguf,
)
from turnout.training.export.huggingface import dtype_words, total_bytes, write_huggingface
from turnout.training.export.naming import Architecture
from turnout.training.export.publish import check_free, publish_export
from turnout.training.export.read_back import check_huggingface
from turnout.training.export.tokenizer_files import to_hf_tokenizer

Format = Literal["hf", "gguf"]
Dtype = Literal["float32", "bfloat16", "q8_0"]


def run_export(checkpoint: Path, out: Path, to: Format, dtype: Dtype) -> None:
    """Write the files of one format, check them, and say what was checked.

    Raises ConfigError where the format cannot hold the model, CheckpointError for a damaged checkpoint, and
    ExportError where the client computes something else; then nothing is left.
    """
    check_free(out)
    if dtype == "q8_0" and to != "gguf":
        raise ConfigError(f"--dtype {dtype} is a form of GGUF's; use --format gguf, or --dtype bfloat16")
    check_first(checkpoint, to, dtype)
    weights = open_weights(checkpoint)
    load_tokenizer_of(weights)  # raises for one of another model
    architecture = choose_architecture(weights.cfg, has_bias=bool(weights.read_bias().any()))
    corpus = corpus_of(weights)
    held_out = (corpus and held_out_tokens(weights.cfg, corpus)) or random_tokens(weights.cfg)
    if to == "hf":
        export_huggingface(weights, architecture, out, getattr(torch, dtype), held_out)
    else:
        export_gguf(weights, architecture, out, KINDS[dtype], held_out)
    print(f"exported to {out}", flush=True)


def check_first(checkpoint: Path, to: Format, dtype: Dtype) -> None:
    """Raise ConfigError for what can be told before many GB are verified; what is damaged is told then."""
    if not (checkpoint / CONFIG_FILE).is_file():
        return
    cfg = read_config(checkpoint).model
    architecture = choose_architecture(cfg, has_bias=False)
    newest = checkpoint if is_checkpoint(checkpoint) else next(iter(list_checkpoints(checkpoint)), checkpoint)
    tokenizer = next(newest.glob("tokenizer.*"), None)
    if tokenizer is None or not is_tokenizer(tokenizer):
        return
    if to == "gguf":
        check_gguf(cfg, architecture, KINDS[dtype], tokenizer)
    elif tokenizer.suffix == ".model":
        to_hf_tokenizer(tokenizer)


def is_tokenizer(path: Path) -> bool:
    try:
        load_tokenizer(path)
    except DataError:
        return False
    return True


def export_huggingface(
    weights: Weights, architecture: Architecture, out: Path, dtype: torch.dtype, held_out: HeldOut
) -> None:
    words = dtype_words(dtype)

    def write(directory: Path) -> None:
        with _bar(out, total_bytes(architecture, weights, dtype)) as on_written:
            write_huggingface(weights, architecture, directory, dtype=dtype, on_written=on_written)

    def check(directory: Path) -> None:
        rounded = Rounded(weights, lambda _, x: x.to(dtype).float())
        proof = prove_huggingface(directory, rounded, held_out)
        files = f"A `{architecture}` in {words}, for transformers 4.57 and newer."
        write_card(directory, weights, "transformers", files, proof)

    publish_export(out, write, check)


def export_gguf(
    weights: Weights, architecture: Architecture, out: Path, kind: Kind, held_out: HeldOut
) -> None:
    check_gguf(weights.cfg, architecture, kind, weights.tokenizer_path)
    rounded = Rounded(weights, partial(to_stored, kind))

    def write(directory: Path) -> None:
        n_bytes = sum(tensor.n_bytes for tensor in gguf_tensors(architecture, weights.cfg, kind))
        with _bar(out, n_bytes) as on_written:
            write_gguf(weights, architecture, directory, kind=kind, on_written=on_written)

    def check(directory: Path) -> None:
        proof = prove_gguf(directory / GGUF_FILE, rounded, architecture, kind, held_out)
        files = f"A `{architecture}` in {kind.name}, for llama.cpp: {GGUF_FILE}."
        write_card(directory, weights, "gguf", files, proof)

    publish_export(out, write, check)


@contextmanager
def _bar(out: Path, n_bytes: int) -> Iterator[Callable[[int], None]]:
    bar, n_written = LiveBar(f"writing {out.name}", n_bytes), 0

    def on_written(n: int) -> None:
        nonlocal n_written
        n_written += n
        bar.update(n_written)

    try:
        yield on_written
    finally:
        bar.close()


def prove_gguf(
    path: Path, rounded: Weights, architecture: Architecture, kind: Kind, held_out: HeldOut
) -> str:
    """Return in words how the file compares, tensor by tensor and by llama.cpp's logits. Raises ExportError.

    llama.cpp rounds activations, too, where matrices are bf16 or Q8_0. So there it loads the file, and
    computes with a twin that holds the same numbers in fp32.
    """
    proof = check_read_back(path, rounded, architecture, kind)
    if not client_gguf.has_llama_cpp():
        return (
            f"{proof}; no logits were compared, for llama.cpp was not at hand (pip install llama-cpp-python)"
        )
    held_out, expected = choose_rows(rounded, held_out)
    with TemporaryDirectory(dir=path.parent) as twin:
        if kind != Kind.F32:
            client_gguf.check_loads(path)
            path = write_gguf(rounded, architecture, Path(twin), kind=Kind.F32)
        found = client_gguf.llama_cpp_logits(path, held_out.rows)
    return f"{proof}; {check_logits(found, expected, client=client_gguf.client_name(), held_out=held_out)}"


def prove_huggingface(directory: Path, rounded: Weights, held_out: HeldOut) -> str:
    """Return in words how the directory compares, by the client's logits and token ids and number by number.

    Raises ExportError.
    """
    held_out, expected = choose_rows(rounded, held_out)
    tokenizer = load_tokenizer_of(rounded)
    known = [[i for i in row.tolist() if i < tokenizer.vocab_size] for row in held_out.rows]
    check_tokenizer(directory, tokenizer, [tokenizer.decode(ids) for ids in known])
    found = transformers_logits(directory, held_out.rows)
    proof = check_logits(found, expected, client=client_name(), held_out=held_out)
    return f"{proof}; {check_huggingface(directory, rounded)}"


def write_card(directory: Path, weights: Weights, library: str, files: str, gate: str) -> None:
    """Write the model card, and say how the files were proven."""
    print(gate, flush=True)
    origin = origin_of(weights.place, weights.manifest) if isinstance(weights, CheckpointWeights) else None
    command = ["turnout", *sys.argv[1:]]
    text = model_card(weights.cfg, origin, library=library, files=files, command=command, gate=gate)
    Disk().write(directory / CARD, [text.encode()])


def corpus_of(weights: Weights) -> Corpus | None:
    """Return the corpus that a checkpoint was trained on, where it still lies where its config says."""
    if not isinstance(weights, CheckpointWeights):
        return None
    path = Path(read_config(weights.place).data.corpus)
    try:
        corpus = open_corpus(path, verify="size")
    except (DataError, OSError):
        return None
    return corpus if corpus.manifest.corpus_hash == weights.manifest.data.corpus_hash else None
