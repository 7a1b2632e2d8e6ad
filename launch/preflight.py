"""Checks of a training run before its ranks start: this machine's devices and compilers, and the corpus."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from turnout.data.corpus import Corpus, open_corpus
from turnout.data.errors import DataError
from turnout.launch.devices import count_gpus
from turnout.moe.experts.requirements import REQUIREMENTS
from turnout.training.batches import build_loader
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError

# How to install what an expert backend imports.
INSTALL = {
    "triton": "pip install triton, of the version that your torch for CUDA asks for",
    "megablocks": "make megablocks (README.md says what it does)",
    "stk": "make megablocks (README.md says what it does)",
}


def check_machine(cfg: RunConfig, nproc: int) -> None:
    """Check that this machine can run nproc ranks of cfg. Raises ConfigError if it cannot."""
    n_gpus = count_gpus()
    if n_gpus and nproc > n_gpus:
        raise ConfigError(
            f"--nproc {nproc} is more than the {n_gpus} GPUs of this machine; use at most {n_gpus}"
        )
    if cfg.train.precision != "fp32" and not n_gpus:
        _check_half_precision(cfg.train.precision)
    compiling = {
        "train.expert_backend=compiled_loop": (cfg.train.expert_backend == "compiled_loop", "sorted_loop"),
        "train.compile=true": (cfg.train.compile, "train.compile=false"),
    }
    for setting, (is_set, instead) in compiling.items():
        if is_set and not n_gpus and not find_compiler():
            raise ConfigError(
                f"{setting} needs a C++ compiler, and there is no g++ or clang++ here; "
                f"install one, name it in CXX, or use {instead}"
            )
        if is_set and not n_gpus and " " in (place := str(_directory_of_torch())):
            raise ConfigError(
                f"{setting}: torch is installed in {place!r}, and what it compiles cannot include files from "
                f"a path with a blank; install Turnout in another directory, or use {instead}"
            )
    if cfg.train.expert_backend != "auto":
        check_kernels(cfg.train.expert_backend, n_gpus)
    if "wandb" in cfg.log.trackers and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "log.trackers names wandb, which is not installed; pip install 'turnout[wandb]', or remove it"
        )


def _directory_of_torch() -> Path:
    spec = importlib.util.find_spec("torch")  # finds it without importing it
    assert spec is not None and spec.origin is not None, "torch is a dependency"
    return Path(spec.origin).parent


def _check_half_precision(precision: str) -> None:
    # Imported here because it imports torch, which takes a second; fp32 needs neither.
    from turnout.training.hardware import cpu_has_bf16, cpu_has_fp16

    if precision == "fp16" and not cpu_has_fp16():
        raise ConfigError("train.precision=fp16: this CPU has no fp16 arithmetic; use fp32 or bf16")
    if precision == "bf16" and not cpu_has_bf16():
        print(
            "turnout: this CPU has no bf16 arithmetic; train.precision=fp32 will be faster", file=sys.stderr
        )


def check_kernels(backend: str, n_gpus: int) -> None:
    """Check for the GPU and the packages that an expert backend needs. Raises ConfigError without them."""
    needs = REQUIREMENTS[backend]
    if needs.is_gpu_only and not n_gpus:
        raise ConfigError(
            f"train.expert_backend={backend} runs Triton kernels, which need a GPU, and there is none here; "
            "use auto, which chooses by device"
        )
    missing = [name for name in needs.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.expert_backend={backend} needs {' and '.join(missing)}, which this machine lacks; "
            f"{INSTALL[missing[-1]]}, or use auto"
        )


def find_compiler() -> str | None:
    """Return the C++ compiler that torch.compile will use; None if there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def check_corpus(cfg: RunConfig) -> Corpus:
    """Open the corpus, verify it as data.verify asks, and check that the run can use it.

    Raises ConfigError if the model's vocabulary is too small for its tokens, DataError if it has no
    validation text.
    """
    corpus = open_corpus(Path(cfg.data.corpus), verify=cfg.data.verify)
    tokenizer = corpus.load_tokenizer()
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={cfg.model.vocab_size} is below the {tokenizer.vocab_size} tokens of "
            f"{corpus.tokenizer_path}; use model.vocab_size={-(-tokenizer.vocab_size // 64) * 64}"
        )
    build_loader(cfg, corpus).windows(0, slice(0, 1))
    if not any(stream.n_documents for stream in corpus.split("valid")):
        raise DataError(
            f"{corpus.path}: the validation split is empty, so the run could not be evaluated; "
            "prepare the corpus with a larger --valid-frac"
        )
    return corpus
