"""Continuations: greedy is the argmax, a seed is reproducible, and the cache agrees with whole passes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.models import random_state, tiny_config, tiny_decoder
from tests.unit.data_fixtures import write_tokenizer
from turnout.data.tokenizer import Tokenizer, load_tokenizer
from turnout.moe.config import ModelConfig
from turnout.moe.kv_cache import CachedDecoder
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.config.sample import SampleConfig
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.generation.generate import (
    MAX_BATCH_PROMPT_TOKENS,
    MAX_BATCH_ROWS,
    Options,
    TextPiece,
    _in_batches,
    continue_prompts,
    stream_texts,
    whole_pass_logits,
)
from turnout.training.generation.sampling import Sampling, sample_tokens

CFG = tiny_config(vocab_size=300, seq_len=24)
PROMPTS = ("the train", "a", "", "each switch so that")
GREEDY, LOUD = Sampling(temperature=0), Sampling(temperature=3.0, top_p=0.99)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def decoder_of(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    """Build a decoder that happens to end none of these texts by itself."""
    return tiny_decoder(cfg, dtype=dtype, seed=1)


def state_of(cfg: ModelConfig) -> RouterState:
    """Return a router state whose bias changes which experts are chosen."""
    return random_state(cfg, bias=0.3)


def sample(tokenizer: Tokenizer, *, seed: int = 0, **changes: object) -> list[str]:
    """Return what training would sample."""
    cfg = SampleConfig.model_validate({"prompts": ["the train", "a"], "n_tokens": 12, **changes})
    decoder = decoder_of(CFG, torch.float32)
    return continue_prompts(decoder, tokenizer, state_of(CFG), cfg, seed=seed)


def cached(cfg: ModelConfig = CFG) -> CachedDecoder:
    return CachedDecoder(decoder_of(cfg), state_of(cfg))


def written(pieces: Sequence[TextPiece]) -> list[str]:
    """Return the texts by row."""
    assert all(piece.end is None or piece is last_of(pieces, piece.row) for piece in pieces)
    n_rows = 1 + max(piece.row for piece in pieces)
    return ["".join(piece.text for piece in pieces if piece.row == row) for row in range(n_rows)]


def last_of(pieces: Sequence[TextPiece], row: int) -> TextPiece:
    return [piece for piece in pieces if piece.row == row][-1]


def stream(tokenizer: Tokenizer, prompts: Sequence[str] = PROMPTS, **changes: object) -> list[TextPiece]:
    options = Options(**{"max_tokens": 8, "sampling": LOUD, **changes})
    return list(stream_texts(cached(), tokenizer, prompts, options))


def test_greedy_takes_the_most_likely_token_each_time(tokenizer: Tokenizer) -> None:
    decoder = decoder_of(CFG, torch.float32)
    ids = [tokenizer.bos_id, *tokenizer.encode("the train")]
    start = len(ids)
    for _ in range(12):
        tokens = torch.tensor([ids + [0] * (CFG.seq_len - len(ids))])
        counted = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            hidden, _ = decoder(tokens, torch.zeros_like(tokens), counted, state_of(CFG))
        ids.append(int(decoder.logits(hidden[0, len(ids) - 1]).argmax()))
        if ids[-1] == tokenizer.eos_id:
            ids.pop()
            break
    assert sample(tokenizer, temperature=0)[0] == tokenizer.decode(ids[start:])


def test_a_seed_is_reproducible_and_another_differs(tokenizer: Tokenizer) -> None:
    assert sample(tokenizer, temperature=3.0) == sample(tokenizer, temperature=3.0)
    assert sample(tokenizer, temperature=3.0) != sample(tokenizer, temperature=3.0, seed=1)


def test_a_long_prompt_keeps_its_tail(tokenizer: Tokenizer) -> None:
    room = CFG.seq_len - 12
    prompt = "switch " * 50 + "the train"
    tail = tokenizer.encode(prompt)[-room:]
    decoder = decoder_of(CFG, torch.float32)
    for _ in range(12):
        tokens = torch.tensor([tail + [0] * (CFG.seq_len - len(tail))])
        with torch.no_grad():
            hidden, _ = decoder(
                tokens, torch.zeros_like(tokens), torch.ones_like(tokens).bool(), state_of(CFG)
            )
        tail.append(int(decoder.logits(hidden[0, len(tail) - 1]).argmax()))
        assert tail[-1] != tokenizer.eos_id, "choose another prompt"
    assert sample(tokenizer, prompts=[prompt], temperature=0) == [tokenizer.decode(tail[room:])]


def test_a_sample_ends_at_its_end_of_text_token_and_the_others_continue(tokenizer: Tokenizer) -> None:
    cfg = SampleConfig(prompts=("the train", "a"), n_tokens=8, temperature=3.0)
    how = Sampling(temperature=3.0, top_p=cfg.top_p)
    decoder, generator = decoder_of(CFG), torch.Generator().manual_seed(2)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in cfg.prompts]
    ids: list[list[int]] = [[], []]
    for _ in range(cfg.n_tokens):
        rows = [prompt + drawn for prompt, drawn in zip(prompts, ids, strict=True)]
        logits = whole_pass_logits(decoder, rows, state_of(CFG))[:, : tokenizer.vocab_size]
        for drawn, token in zip(ids, sample_tokens(logits, how, [generator]).tolist(), strict=True):
            drawn.append(token)
    # A token that the first text reaches in the middle, and the second never does.
    end = next(i for i in range(2, 6) if ids[0][i] not in (*ids[0][:i], *ids[1]))
    tokenizer.eos_id, kept = ids[0][end], tokenizer.eos_id
    try:
        texts = continue_prompts(decoder, tokenizer, state_of(CFG), cfg, seed=2)
    finally:
        tokenizer.eos_id = kept
    assert texts == [tokenizer.decode(ids[0][:end]), tokenizer.decode(ids[1])]


def test_sampling_leaves_no_trace(tokenizer: Tokenizer) -> None:
    decoder, cfg = decoder_of(CFG).train(), SampleConfig(prompts=PROMPTS, n_tokens=3)
    torch.manual_seed(5)
    random_before = torch.get_rng_state()
    weights_before = {name: p.clone() for name, p in decoder.named_parameters()}
    continue_prompts(decoder, tokenizer, state_of(CFG), cfg, seed=0)
    assert decoder.training
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(torch.equal(p, weights_before[name]) for name, p in decoder.named_parameters())


@torch.no_grad()
def test_padding_takes_no_capacity_of_an_expert() -> None:
    """With a capacity factor an expert keeps the best rows of a sequence; padding must not be among them."""
    cfg = tiny_config(vocab_size=300, seq_len=24, router={"capacity_factor": 1.0})
    decoder, state, rows = decoder_of(cfg), state_of(cfg), [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17]]

    def alone(row: list[int], n_counted: int) -> torch.Tensor:
        tokens = torch.tensor([row + [0] * (cfg.seq_len - len(row))])
        is_counted = torch.arange(cfg.seq_len)[None] < n_counted
        hidden, _ = decoder(tokens, torch.zeros_like(tokens), is_counted, state)
        return decoder.logits(hidden[0, len(row) - 1]).float()

    want = torch.stack([alone(row, len(row)) for row in rows])
    torch.testing.assert_close(whole_pass_logits(decoder, rows, state), want)
    with_padding = torch.stack([alone(row, cfg.seq_len) for row in rows])
    assert not torch.allclose(with_padding, want), "padding took no capacity, so this proves nothing"


def test_the_cache_gives_the_text_of_whole_passes(tokenizer: Tokenizer) -> None:
    cfg = SampleConfig(prompts=PROMPTS, n_tokens=8, temperature=0)
    decoder = decoder_of(CFG)
    want = continue_prompts(decoder, tokenizer, state_of(CFG), cfg, seed=0)
    got = stream(tokenizer, sampling=GREEDY)
    assert len(set(want)) == len(PROMPTS)
    # The stream leaves out the bytes of a character that the last token did not finish.
    assert written(got) == [text.rstrip("\ufffd") for text in want]
    one = SampleConfig(prompts=("the train",), n_tokens=8, temperature=3.0, top_p=0.99)
    drawn = continue_prompts(decoder, tokenizer, state_of(CFG), one, seed=5)
    assert written(stream(tokenizer, ["the train"], seed=5)) == [text.rstrip("\ufffd") for text in drawn]


def test_a_row_does_not_depend_on_the_others(tokenizer: Tokenizer) -> None:
    together = written(stream(tokenizer, seed=3))
    assert together == written(stream(tokenizer, seed=3))
    assert together != written(stream(tokenizer, seed=4))
    for row, prompt in enumerate(PROMPTS):
        assert written(stream(tokenizer, [prompt], seed=3 + row)) == [together[row]]


def test_batches_are_bounded_in_rows_and_tokens() -> None:
    long = MAX_BATCH_PROMPT_TOKENS // 2
    assert list(_in_batches([3] * (2 * MAX_BATCH_ROWS + 1))) == [range(0, 32), range(32, 64), range(64, 65)]
    assert list(_in_batches([long, long, 1, 3 * long, 1])) == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
    ]


def test_samples_of_a_prompt_are_rows_of_their_own(tokenizer: Tokenizer) -> None:
    n_samples = MAX_BATCH_ROWS // 3 + 2
    pieces = stream(tokenizer, PROMPTS[:3], n_samples=n_samples, max_tokens=4)
    texts = written(pieces)
    assert len(texts) == 3 * n_samples > MAX_BATCH_ROWS
    for row in (0, 1, n_samples, MAX_BATCH_ROWS - 1, MAX_BATCH_ROWS, 3 * n_samples - 1):
        alone = stream(tokenizer, [PROMPTS[row // n_samples]], seed=row, max_tokens=4)
        assert written(alone) == [texts[row]], row


def test_a_text_ends_for_a_reason(tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, sampling=GREEDY, max_tokens=100)
    assert {piece.end for piece in pieces} == {None, "seq_len"}
    for row, prompt in enumerate(PROMPTS):
        n_prompt = 1 + len(tokenizer.encode(prompt))
        assert n_prompt + sum(piece.row == row for piece in pieces) == CFG.seq_len
    assert last_of(stream(tokenizer), 0).end == "max tokens"
    text = written(pieces)[1]
    stopped = stream(tokenizer, ["a"], sampling=GREEDY, max_tokens=100, stop=(text[3:5],))
    assert (written(stopped)[0], stopped[-1].end) == (text[: text.index(text[3:5])], "stop string")


def test_end_of_text_ends_one_row_and_not_the_others(tokenizer: Tokenizer) -> None:
    model = cached()
    plain = list(stream_texts(model, tokenizer, PROMPTS, Options(max_tokens=8, sampling=GREEDY)))
    before = [ids_of(tokenizer, model, prompt) for prompt in PROMPTS]
    ending = next(t for t in before[1] if all(t not in ids for i, ids in enumerate(before) if i != 1))
    tokenizer.eos_id, kept = ending, tokenizer.eos_id
    try:
        pieces = list(stream_texts(model, tokenizer, PROMPTS, Options(max_tokens=8, sampling=GREEDY)))
    finally:
        tokenizer.eos_id = kept
    assert [last_of(pieces, row).end for row in range(4)] == [
        "max tokens", "end of text", "max tokens", "max tokens",
    ]  # fmt: skip
    assert sum(piece.row == 1 for piece in pieces) == before[1].index(ending) + 1
    assert [text for row, text in enumerate(written(pieces)) if row != 1] == [
        text for row, text in enumerate(written(plain)) if row != 1
    ]


def ids_of(tokenizer: Tokenizer, model: CachedDecoder, prompt: str) -> list[int]:
    """Return the greedy tokens after a prompt."""
    logits, cache = model.prefill([[tokenizer.bos_id, *tokenizer.encode(prompt)]], CFG.seq_len)
    ids = []
    for _ in range(8):
        ids.append(int(logits[0, : tokenizer.vocab_size].argmax()))
        logits = model.extend(ids[-1:], cache)
    return ids


def test_a_sliding_window_continues_beyond_seq_len(tokenizer: Tokenizer) -> None:
    model = cached(tiny_config(vocab_size=300, seq_len=24, sliding_window=7))
    prompt = "each switch so that the train moves each lever of seven cars at 0417"
    assert len(tokenizer.encode(prompt)) > 24
    pieces = list(stream_texts(model, tokenizer, [prompt], Options(max_tokens=40, sampling=LOUD)))
    assert len(pieces) == 40 and pieces[-1].end == "max tokens"


def test_padded_vocabulary_ids_are_never_sampled(tokenizer: Tokenizer) -> None:
    cfg = tiny_config(vocab_size=640, seq_len=24)
    decoder = decoder_of(cfg)
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    top = whole_pass_logits(decoder, rows, state_of(cfg)).argmax(-1)
    assert (top >= tokenizer.vocab_size).any(), "none would be sampled, so this proves nothing"
    options = Options(max_tokens=8, sampling=GREEDY)
    assert written(list(stream_texts(cached(cfg), tokenizer, PROMPTS, options)))
    sampled = SampleConfig(prompts=PROMPTS, n_tokens=8, temperature=0)
    assert continue_prompts(decoder, tokenizer, state_of(cfg), sampled, seed=0)


def test_a_prompt_without_room_and_a_broken_model_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ConfigError, match=r"prompt 2 has \d+ tokens, .* seq_len=24 .* shorten it to at most 23 tokens"
    ):
        stream(tokenizer, ["a", "switch " * 30])
    model = cached()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="logits are not finite"):
        list(stream_texts(model, tokenizer, PROMPTS, Options(max_tokens=8)))
