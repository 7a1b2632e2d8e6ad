"""The client of an exported Hugging Face directory: transformers, as a user would call it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.data.tokenizer import Tokenizer
from turnout.training.errors import ExportError
from turnout.training.export.tokenizer_files import PROBES


@torch.no_grad()
def transformers_logits(directory: Path, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the client's fp32 logits [length, V] of each row of tokens.

    Raises ExportError where it cannot load the model, misses a tensor, or finds one that it does not know.
    """
    import transformers  # seconds to import, and only an export needs it

    with _quiet():
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,  # a stranger's directory may hold a pickle beside them
                # Nor is its config to choose code: its own, or kernels from somewhere.
                trust_remote_code=False,
                attn_implementation="sdpa",
                return_dict=True,
            )
        except Exception as err:  # whatever a client raises, the directory is not to be handed over
            raise ExportError(f"{client_name()} cannot load it: {err}") from err
    info = info if isinstance(info, dict) else vars(info)
    wrong = {kind: found for kind, found in info.items() if found}
    if wrong:
        kind, found = next(iter(wrong.items()))
        raise ExportError(f"{client_name()} loads it with {kind} {_first(found)}; nothing was kept")
    model.eval()
    return [model(row.unsqueeze(0), use_cache=False).logits[0] for row in rows]


def check_tokenizer(directory: Path, ours: Tokenizer, texts: Sequence[str]) -> None:
    """Raise ExportError where AutoTokenizer gives other ids than training had, or other control ids."""
    import transformers

    with _quiet():
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            control = (theirs.bos_token_id, theirs.eos_token_id)
            spelled = [f"a{theirs.bos_token}b{theirs.eos_token} c"]
            differing = [
                text
                for text in (*PROBES, *spelled, *texts)
                if theirs.encode(text, add_special_tokens=False) != ours.encode(text)
                or theirs.encode(text) != [ours.bos_id, *ours.encode(text)]
            ]
        except Exception as err:
            raise ExportError(f"{client_name()} has no tokenizer of it: {err}") from err
    if control != (ours.bos_id, ours.eos_id):
        raise ExportError(f"transformers takes {control} for begin and end, not {(ours.bos_id, ours.eos_id)}")
    if differing:
        raise ExportError(f"transformers tokenises {differing[0][:60]!r} differently; nothing was kept")


def client_name() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _first(found: Any) -> str:
    return str(next(iter(found), found))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's chatter and bars off the terminal; what matters comes as an exception."""
    from transformers.utils import logging as chatter

    level, has_bar = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if has_bar:
            chatter.enable_progress_bar()
