"""`turnout import`: make a run at step 0 of a Hugging Face model, dense ones upcycled to experts.

run_import is the whole story. It publishes the run as run_export does an export: proven, or not at all.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from turnout.data.corpus import Corpus
from turnout.data.files import sha256_of
from turnout.launch.commands.export import check_free, publish
from turnout.launch.preflight import check_corpus
from turnout.launch.run_dir import attachments, create_run_dir
from turnout.launch.settings import check_config
from turnout.moe.config import ModelConfig
from turnout.training.checkpoint.weights import CheckpointWeights
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError
from turnout.training.export.gate import (
    check_logits,
    choose_rows,
    transformers_logits,
    transformers_name,
)
from turnout.training.export.reader import HfWeights
from turnout.training.export.to_checkpoint import write_first_checkpoint


def run_import(source: Path, wanted: RunConfig, *, run_dir: Path, n_upcycled: int | None) -> None:
    """Make a run of a Hugging Face directory, which `turnout train --resume` continues.

    The directory decides the model; the recipe decides the rest: balancing, sequence length, data, optimizer.
    n_upcycled: the experts to make of each layer of a dense model, with the recipe's routing.

    Raises ConfigError, DataError or CheckpointError for what cannot be imported, and ExportError where the
    run would compute something else than transformers does; then nothing is left.
    """
    check_free(run_dir, "--run-dir")
    experts = None if n_upcycled is None else upcycled_settings(wanted.model, n_upcycled)
    weights = HfWeights(source, experts=experts, seed=wanted.train.seed)
    model = imported_model(weights.cfg, wanted.model)
    cfg = check_config({**wanted.model_dump(), "model": model.model_dump()}, str(source))
    corpus = check_corpus(cfg)
    check_same_tokenizer(source, corpus)
    weights.cfg = cfg.model

    with publish(run_dir, "--run-dir") as directory:
        create_run_dir(directory, cfg, corpus, nproc=1)
        checkpoint = write_first_checkpoint(weights, directory, attachments(directory, cfg))
        written = CheckpointWeights(checkpoint, cfg.model)
        held_out, expected = choose_rows(written, corpus)
        found = transformers_logits(source, held_out.rows)
        print(check_logits(found, expected, client=transformers_name(), held_out=held_out), flush=True)
    print(
        f"imported as {run_dir}; to train it: "
        f"turnout train {run_dir}/config.toml --run-dir {run_dir} --resume"
    )


def upcycled_settings(model: ModelConfig, n_experts: int) -> dict[str, object]:
    """Return the settings of the experts. Raises ConfigError where they would not compute the dense layer.

    Equal experts do only if a token's weights sum to 1 (Komatsuzaki et al. 2022, 2212.05055, section 3).
    """
    router = model.router
    if model.top_k > n_experts:
        raise ConfigError(
            f"--upcycle {n_experts}: each token uses model.top_k={model.top_k} experts; make at least as "
            f"many, or --set model.top_k={n_experts}"
        )
    faults = {
        "model.router.normalize=true": not router.normalize,
        "model.router.scale=1.0": router.scale != 1.0,
        "model.router.capacity_factor=none": router.capacity_factor is not None,
    }
    if wrong := [setting for setting, is_wrong in faults.items() if is_wrong]:
        raise ConfigError(
            f"--upcycle {n_experts}: the model would differ from the dense one; use {', '.join(wrong)}"
        )
    return {"n_experts": n_experts, "top_k": model.top_k, "router": router.model_dump()}


def imported_model(found: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """Return the found model with the recipe's sequence length and balancing.

    Raises ConfigError where the recipe's sequences are longer than the model's positions.
    """
    if wanted.seq_len > found.seq_len:
        raise ConfigError(
            f"model.seq_len={wanted.seq_len} is more than the {found.seq_len} positions of the model; use at "
            f"most {found.seq_len}"
        )
    window = found.sliding_window
    if window is not None and window >= wanted.seq_len:
        print(f"sliding window of {window} left out: it hides nothing at model.seq_len={wanted.seq_len}")
        window = None
    changes = {"seq_len": wanted.seq_len, "balance": wanted.balance, "sliding_window": window}
    return found.model_copy(update=changes)


def _give_same_ids(one: Path, other: Path) -> bool:
    """Return whether two tokenizers give the same ids, before a tokenizer.json adds any around a text."""
    if sha256_of(one) == sha256_of(other):
        return True
    if (one.suffix, other.suffix) != (".json", ".json"):
        return False
    first, second = (json.loads(HfTokenizer.from_file(str(path)).to_str()) for path in (one, other))
    return {**first, "post_processor": None} == {**second, "post_processor": None}


def check_same_tokenizer(source: Path, corpus: Corpus) -> None:
    """Raise ConfigError where the corpus was not tokenised with the directory's tokenizer."""
    files = [path for name in ("tokenizer.model", "tokenizer.json") if (path := source / name).is_file()]
    if not any(_give_same_ids(corpus.tokenizer_path, path) for path in files):
        raise ConfigError(
            f"{corpus.path}: its tokenizer is not {files[0]}, so its ids stand for other text; "
            f"prepare a corpus with --tokenizer {files[0]}"
        )
