"""Exports under transformers 4, in an environment that has it: `make test-transformers4`."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.exports import VARIANTS, save_weights, variant_weights
from turnout.launch.commands.export import run_export
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.checkpoint.weights import load_decoder

if not transformers.__version__.startswith("4."):
    pytest.skip("needs transformers 4; `make test-transformers4` has it", allow_module_level=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_4_computes_the_same(
    name: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gate uses the installed version: no missing key, the same logits, the same ids."""
    checkpoint = save_weights(variant_weights(name, tokenizer), tmp_path / "run")
    run_export(checkpoint, out := tmp_path / "out", "hf", "float32")
    assert "transformers 4." in capsys.readouterr().out
    assert (
        transformers.AutoConfig.from_pretrained(out).rope_theta
        == variant_weights(name, tokenizer).cfg.rope_theta
    )


def test_greedy_text_is_the_same(tokenizer: Path, tmp_path: Path) -> None:
    checkpoint = save_weights(weights := variant_weights("glm4-all", tokenizer), tmp_path / "run")
    run_export(checkpoint, out := tmp_path / "out", "hf", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = torch.tensor([[1, 40, 7]])
    found = model.generate(prompt, do_sample=False, max_new_tokens=30, eos_token_id=-1)[0].tolist()
    assert found == greedy(*load_decoder(weights), prompt[0].tolist(), len(found))


def greedy(decoder: Decoder, state: RouterState, ids: list[int], n_tokens: int) -> list[int]:
    """Return the ids continued to n_tokens, with a full forward pass for each new one."""
    while len(ids) < n_tokens:
        tokens = torch.tensor([ids + [0] * (decoder.cfg.seq_len - len(ids))])
        counted = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            hidden, _ = decoder(tokens, torch.zeros_like(tokens), counted, state)
        ids = [*ids, int(decoder.logits(hidden[0, len(ids) - 1]).argmax())]
    return ids
