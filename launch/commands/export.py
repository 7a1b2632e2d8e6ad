"""`turnout export`: write a model in the format of another program, and prove it before it gets its name.

run_export is the whole story, top to bottom; what it calls stands below it in that order. The formats are
written in training/export/huggingface.py and gguf_file.py, and their logits compared in gate.py. `turnout
import` publishes its run with the same functions.
"""

import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from turnout.training.export.card import CARD, model_card, origin_of
from turnout.training.export.gate import (
    Rounded,
    check_logits,
    check_tokenizer,
    choose_rows,
    has_llama_cpp,
    llama_cpp_logits,
    llama_cpp_name,
    load_llama_cpp,
    transformers_logits,
    transformers_name,
)
from turnout.training.export.gguf_file import (
    GGUF_FILE,
    KINDS,
    Kind,
    check_gguf,
    gguf_tensors,
    read_back_gguf,
    to_stored,
    write_gguf,
)
from turnout.training.export.hf_config import Architecture, choose_architecture
from turnout.training.export.huggingface import to_hf_tokenizer, total_bytes, write_huggingface
from turnout.training.export.reader import read_back_huggingface

Format = Literal["hf", "gguf"]
Dtype = Literal["float32", "bfloat16", "q8_0"]
# Suffix of a file beside the directory that is being written. Its writer holds a lock on it. A file, not the
# directory, because NFS forwards locks of files only to its server.
LOCK = ".lock"


def run_export(checkpoint: Path, out: Path, to: Format, dtype: Dtype) -> None:
    """Write the files of one format, check them, and print what was checked.

    Raises ConfigError where the format cannot hold the model, CheckpointError for a damaged checkpoint, and
    ExportError where the other program computes something else; then nothing is left.
    """
    check_free(out)
    if dtype == "q8_0" and to != "gguf":
        raise ConfigError(f"--dtype {dtype} exists in GGUF only; use --format gguf, or --dtype bfloat16")
    check_before_verifying(checkpoint, to, dtype)

    weights = open_weights(checkpoint)
    load_tokenizer_of(weights)  # raises for the tokenizer of another model
    architecture = choose_architecture(weights.cfg, has_bias=bool(weights.read_bias().any()))
    if to == "gguf":
        check_gguf(weights.cfg, architecture, KINDS[dtype], weights.tokenizer_path)
    corpus = corpus_of(weights)

    with publish(out) as directory:
        if to == "hf":
            files, proof = export_huggingface(weights, architecture, directory, getattr(torch, dtype), corpus)
        else:
            files, proof = export_gguf(weights, architecture, directory, KINDS[dtype], corpus)
        print(proof, flush=True)
        origin = (
            origin_of(weights.place, weights.manifest) if isinstance(weights, CheckpointWeights) else None
        )
        library, command = "transformers" if to == "hf" else "gguf", ["turnout", *sys.argv[1:]]
        card = model_card(weights.cfg, origin, library=library, files=files, command=command, proof=proof)
        Disk().write(directory / CARD, [card.encode()])
    print(f"exported to {out}", flush=True)


def check_free(out: Path, option: str = "--out") -> None:
    """Raise ConfigError where something already exists under the name of an export."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{option} {out} exists already; name a new directory, or remove this one yourself")


def check_before_verifying(checkpoint: Path, to: Format, dtype: Dtype) -> None:
    """Raise ConfigError for what a small file shows, before many GB are verified.

    Damaged files are left to the verification, which names them.
    """
    if not (checkpoint / CONFIG_FILE).is_file():
        return
    cfg = read_config(checkpoint).model
    architecture = choose_architecture(cfg, has_bias=False)
    newest = checkpoint if is_checkpoint(checkpoint) else next(iter(list_checkpoints(checkpoint)), checkpoint)
    tokenizer = next(newest.glob("tokenizer.*"), None)
    if tokenizer is None:
        return
    try:
        load_tokenizer(tokenizer)
    except DataError:
        return
    if to == "gguf":
        check_gguf(cfg, architecture, KINDS[dtype], tokenizer)
    elif tokenizer.suffix == ".model":
        to_hf_tokenizer(tokenizer)


def corpus_of(weights: Weights) -> Corpus | None:
    """Return the corpus that a checkpoint was trained on, if it is still where its config says."""
    if not isinstance(weights, CheckpointWeights):
        return None
    path = Path(read_config(weights.place).data.corpus)
    try:
        corpus = open_corpus(path, verify="size")
    except (DataError, OSError):
        return None
    return corpus if corpus.manifest.corpus_hash == weights.manifest.data.corpus_hash else None


@contextmanager
def publish(out: Path, option: str = "--out") -> Iterator[Path]:
    """Yield an empty directory beside out, which gets the name out when the block ends without an error.

    Otherwise nothing is left. Leftovers of killed exports of the same name are removed first. Raises
    ConfigError where out exists.
    """
    check_free(out, option)
    _remove_leftovers(out)
    staged, disk = out.with_name(f"{out.name}.{socket.gethostname()}-{os.getpid()}.tmp"), Disk()
    staged.parent.mkdir(parents=True, exist_ok=True)
    lock = staged.with_name(staged.name + LOCK)
    with lock.open("x") as file:
        _lock(file.fileno())
        try:
            staged.mkdir()
            yield staged
            disk.flush_directory(staged)
            check_free(out, option)  # another export may have been faster
            disk.rename(staged, out)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            lock.unlink()


def _remove_leftovers(out: Path) -> None:
    """Remove what killed exports of this name left behind; those of live processes hold their locks."""
    for lock in out.parent.glob(f"{out.name}.*.tmp{LOCK}"):
        # Another export may remove the same leftovers.
        with suppress(FileNotFoundError), lock.open("r+") as file:
            if _lock(file.fileno()):
                # rmtree leaves a symbolic link alone, and what it points to.
                shutil.rmtree(lock.with_name(lock.name.removesuffix(LOCK)), ignore_errors=True)
                lock.unlink()


def _lock(file: int) -> bool:
    """Lock a file; return whether it was free. A file system without locks counts as locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def export_huggingface(
    weights: Weights, architecture: Architecture, directory: Path, dtype: torch.dtype, corpus: Corpus | None
) -> tuple[str, str]:
    """Write a Hugging Face directory and prove it; return what the files are and how they were proven.

    transformers has to give our token ids and logits, and every parameter is read back and compared. Raises
    ExportError where something differs.
    """
    with LiveBar("writing safetensors", total_bytes(architecture, weights, dtype)) as bar:
        write_huggingface(weights, architecture, directory, dtype=dtype, on_written=bar.update)

    rounded = Rounded(weights, lambda _, x: x.to(dtype).float())
    held_out, expected = choose_rows(rounded, corpus)
    tokenizer = load_tokenizer_of(rounded)
    known = [[i for i in row.tolist() if i < tokenizer.vocab_size] for row in held_out.rows]
    check_tokenizer(directory, tokenizer, [tokenizer.decode(ids) for ids in known])
    found = transformers_logits(directory, held_out.rows)
    logits = check_logits(found, expected, client=transformers_name(), held_out=held_out)
    proof = f"{logits}; {read_back_huggingface(directory, rounded)}"
    dtype_name = str(dtype).removeprefix("torch.")
    return f"A `{architecture}` in {dtype_name}, for transformers 4.57 and newer.", proof


def export_gguf(
    weights: Weights, architecture: Architecture, directory: Path, kind: Kind, corpus: Corpus | None
) -> tuple[str, str]:
    """Write a GGUF file and prove it; return what the file is and how it was proven.

    Every tensor is read back and compared, and llama.cpp, where installed, has to give our logits. It rounds
    activations, too, where matrices are bf16 or Q8_0. So there it only loads the file, and computes with a
    twin that holds the same values in fp32. Raises ExportError where something differs.
    """
    n_bytes = sum(tensor.n_bytes for tensor in gguf_tensors(architecture, weights.cfg, kind))
    with LiveBar(f"writing {GGUF_FILE}", n_bytes) as bar:
        path = write_gguf(weights, architecture, directory, kind=kind, on_written=bar.update)

    files = f"A `{architecture}` in {kind.name}, for llama.cpp: {GGUF_FILE}."
    proof = read_back_gguf(path, weights, architecture, kind)
    if not has_llama_cpp():
        reason = "llama.cpp is not installed (pip install llama-cpp-python)"
        return files, f"{proof}; no logits were compared, because {reason}"
    rounded = Rounded(weights, partial(to_stored, kind))
    held_out, expected = choose_rows(rounded, corpus)
    with TemporaryDirectory(dir=directory) as twin:
        if kind != Kind.F32:
            load_llama_cpp(path)
            path = write_gguf(rounded, architecture, Path(twin), kind=Kind.F32)
        found = llama_cpp_logits(path, held_out.rows)
    return files, f"{proof}; {check_logits(found, expected, client=llama_cpp_name(), held_out=held_out)}"
