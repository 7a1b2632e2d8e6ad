"""Exports under llama.cpp, in an environment that has llama-cpp-python: `make test-llamacpp`."""

from pathlib import Path

import pytest

from tests.exports import save_weights, variant_weights
from tests.unit.training.export.test_gguf import LOADABLE
from turnout.data.tokenizer import load_tokenizer
from turnout.launch.commands.export import run_export
from turnout.training.errors import ExportError
from turnout.training.export import gguf_file
from turnout.training.export.gate import (
    check_logits,
    expected_logits,
    has_llama_cpp,
    llama_cpp_logits,
    random_tokens,
)
from turnout.training.export.huggingface import PROBES

if not has_llama_cpp():
    pytest.skip("needs llama-cpp-python; `make test-llamacpp` has it", allow_module_level=True)


@pytest.mark.parametrize("name", LOADABLE)
def test_llama_cpp_computes_the_same(
    name: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dtype = ["float32", "bfloat16", "q8_0"][LOADABLE.index(name) % 3]
    checkpoint = save_weights(variant_weights(name, tokenizer), tmp_path / "run")
    run_export(checkpoint, tmp_path / "out", "gguf", dtype)
    said = capsys.readouterr().out
    assert "llama.cpp (llama-cpp-python" in said and "computes the same" in said


def test_rows_that_were_not_reordered_change_llama_cpps_logits(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = variant_weights("mixtral-gqa", tokenizer)
    held_out = random_tokens(weights.cfg)
    expected = expected_logits(weights, held_out.rows)
    monkeypatch.setattr(gguf_file, "to_neighbours", lambda rows, n_heads: rows)
    path = gguf_file.write_gguf(weights, "mixtral", tmp_path, kind=gguf_file.Kind.F32)
    with pytest.raises(ExportError, match="computes another model"):
        found = llama_cpp_logits(path, held_out.rows)
        check_logits(found, expected, client="llama.cpp", held_out=held_out)


def test_llama_cpp_tokenises_as_training_did(tokenizer: Path, tmp_path: Path) -> None:
    import llama_cpp

    weights = variant_weights("mixtral-gqa", tokenizer)
    path = gguf_file.write_gguf(weights, "mixtral", tmp_path, kind=gguf_file.Kind.F32)
    model, ours = (
        llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False),
        load_tokenizer(tokenizer),
    )
    for text in (*(probe for probe in PROBES if probe), "a<s>b</s> c"):
        found = model.tokenize(text.encode(), add_bos=False, special=False)
        if "\x00" not in text:  # llama.cpp takes C strings
            assert found == ours.encode(text), text
