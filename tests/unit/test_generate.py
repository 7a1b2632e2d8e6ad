"""Sampling: greedy is the argmax, top-p cuts the tail, and a seed repeats itself."""

from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer, load_tokenizer
from tests.models import random_state, tiny_config, tiny_decoder
from tests.unit.data_fixtures import write_tokenizer
from training.config import SampleConfig
from training.generate import continue_prompts, sample_tokens

CFG = tiny_config(vocab_size=300, seq_len=24)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def generate(tokenizer: Tokenizer, *, seed: int = 0, **changes: object) -> list[str]:
    cfg = SampleConfig.model_validate({"prompts": ["the train", "a"], "n_tokens": 12, **changes})
    decoder = tiny_decoder(CFG, dtype=torch.float32)
    return continue_prompts(decoder, tokenizer, random_state(CFG), cfg, seed=seed)


def test_greedy_takes_the_most_likely_token_each_time(tokenizer: Tokenizer) -> None:
    decoder = tiny_decoder(CFG, dtype=torch.float32)
    ids = [tokenizer.bos_id, *tokenizer.encode("the train")]
    start = len(ids)
    for _ in range(12):
        tokens = torch.tensor([ids + [0] * (CFG.seq_len - len(ids))])
        counted = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            hidden, _ = decoder(tokens, torch.zeros_like(tokens), counted, random_state(CFG))
        ids.append(int(decoder.logits(hidden[0, len(ids) - 1]).argmax()))
        if ids[-1] == tokenizer.eos_id:
            ids.pop()
            break
    assert generate(tokenizer, temperature=0)[0] == tokenizer.decode(ids[start:])


def test_a_seed_repeats_itself_and_another_does_not(tokenizer: Tokenizer) -> None:
    assert generate(tokenizer, temperature=3.0) == generate(tokenizer, temperature=3.0)
    assert generate(tokenizer, temperature=3.0) != generate(tokenizer, temperature=3.0, seed=1)


def test_a_long_prompt_keeps_its_tail(tokenizer: Tokenizer) -> None:
    room = CFG.seq_len - 12
    prompt = "switch " * 50 + "the train"
    tail = tokenizer.encode(prompt)[-room:]
    decoder = tiny_decoder(CFG, dtype=torch.float32)
    for _ in range(12):
        tokens = torch.tensor([tail + [0] * (CFG.seq_len - len(tail))])
        with torch.no_grad():
            hidden, _ = decoder(
                tokens, torch.zeros_like(tokens), torch.ones_like(tokens).bool(), random_state(CFG)
            )
        tail.append(int(decoder.logits(hidden[0, len(tail) - 1]).argmax()))
        assert tail[-1] != tokenizer.eos_id, "choose another prompt"
    assert generate(tokenizer, prompts=[prompt], temperature=0) == [tokenizer.decode(tail[room:])]


def test_top_p_never_draws_from_the_tail() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.0]]).expand(500, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = set(sample_tokens(logits, 1.0, 0.9, generator).tolist())
    assert drawn == {0, 1}
    assert set(sample_tokens(logits, 1.0, 1.0, generator).tolist()) == {0, 1, 2, 3}


def test_frequencies_follow_the_temperature() -> None:
    logits = torch.tensor([[1.0, 0.0]]).expand(20_000, 2)
    share = float(sample_tokens(logits, 0.5, 1.0, torch.Generator().manual_seed(0)).float().mean())
    assert share == pytest.approx(1 / (1 + torch.e**2), abs=0.01)
