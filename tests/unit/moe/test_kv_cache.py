"""Decoding from a cache gives the logits of whole passes, for every model variant and any prompt lengths."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_state, tiny_config, tiny_decoder
from turnout.moe.config import ModelConfig
from turnout.moe.kv_cache import CachedDecoder
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder

SEQ_LEN = 19
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5), (8,), (27, 18, 28), (1, 6, 1), (0, 3, 9, 8, 8, 7))
N_NEW = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"n_kv_heads": 4},
    "multi-query": {"n_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "tie_embeddings": True},
    "window": {"sliding_window": 4, "qk_norm": True},
    "window-of-one": {"sliding_window": 1},
    "window-past-the-prompts": {"sliding_window": 14},
    "dense-first": {"n_layers": 3, "n_dense_layers": 1, "d_ff": 24},
    "shared": {"n_shared_experts": 2},
    "sigmoid-groups": {
        "router": {"score": "sigmoid", "n_groups": 3, "top_groups": 2, "scale": 1.5},
        "balance": {"bias_rate": 0.01},
    },
    "top-1": {"top_k": 1, "router": {"normalize": False}},
}
Model = tuple[ModelConfig, Decoder, RouterState, CachedDecoder]


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    cfg = tiny_config(**{"seq_len": SEQ_LEN, **changes})
    decoder, state = tiny_decoder(cfg, dtype=dtype), random_state(cfg, bias=0.3)
    return cfg, decoder, state, CachedDecoder(decoder, state)


@torch.no_grad()
def whole_pass(decoder: Decoder, state: RouterState, rows: list[list[int]]) -> Tensor:
    """Return the logits after each row, [rows, V]; each row is a pass of its own, padded at its end."""
    logits = []
    for row in rows:
        tokens = torch.tensor([row + [0] * (decoder.cfg.seq_len - len(row))])
        hidden, _ = decoder(tokens, torch.zeros_like(tokens), torch.ones_like(tokens).bool(), state)
        logits.append(decoder.logits(hidden[0, len(row) - 1]))
    return torch.stack(logits)


def differences(model: Model, n_new: int = N_NEW, slow: Decoder | None = None) -> list[float]:
    """Return the largest difference of logits after the prompts, and after each of n_new greedy tokens."""
    _, decoder, state, cached = model
    slow = slow or decoder
    rows = [list(prompt) for prompt in PROMPTS]
    logits, cache = cached.prefill(rows, max(map(len, rows)) + n_new)
    found = []
    for step in range(n_new + 1):
        want = whole_pass(slow, state, rows)
        assert want.std() > 0.1, "logits this small prove nothing"
        found.append(float((logits - want).abs().max() / want.abs().max()))
        tokens = want.argmax(-1).tolist()
        assert logits.argmax(-1).tolist() == tokens
        if step < n_new:
            logits = cached.extend(tokens, cache)
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
    return found


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_whole_passes(changes: dict[str, Any]) -> None:
    assert max(differences(build(torch.float64, **changes))) < 1e-10
    assert max(differences(build(torch.float32, **changes))) < 1e-5


def test_with_a_window_rows_grow_beyond_seq_len() -> None:
    model = build(sliding_window=5)
    longer = tiny_decoder(tiny_config(seq_len=64, sliding_window=5))
    assert longer.state_dict().keys() == model[1].state_dict().keys()
    assert max(differences(model, n_new=3 * SEQ_LEN - len(PROMPTS[0]), slow=longer)) < 1e-10


def test_without_a_window_seq_len_is_the_end() -> None:
    _, _, _, cached = build()
    with pytest.raises(ValueError, match=r"n_positions=20 is beyond seq_len=19"):
        cached.prefill([[1]], SEQ_LEN + 1)
    _, cache = cached.prefill([[1, 2, 3]], 4)
    cached.extend([1], cache)
    with pytest.raises(ValueError, match="a row holds 4 tokens"):
        cached.extend([1], cache)
    for prompts in ([], [[]], [[1], [1, 2, 3]]):
        with pytest.raises(ValueError, match="must hold 1 to n_positions=2"):
            cached.prefill(prompts, 2)


def test_a_cache_smaller_than_the_window_is_not_overrun() -> None:
    _, _, _, cached = build(sliding_window=8)
    _, cache = cached.prefill([[1, 2, 3]], 4)
    cached.extend([1], cache)
    with pytest.raises(ValueError, match="a row holds 4 tokens"):
        cached.extend([1], cache)


@pytest.mark.parametrize(("window", "n_slots"), [(4, 4), (None, 15)])
def test_the_cache_is_kept_to_its_size(window: int | None, n_slots: int) -> None:
    cfg, _, _, cached = build(sliding_window=window)
    _, cache = cached.prefill(PROMPTS, 15)
    shapes = {layer.keys.shape for layer in cache.layers}
    for _ in range(4):
        cached.extend([1] * len(PROMPTS), cache)
    assert shapes == {layer.values.shape for layer in cache.layers}
    assert shapes == {(len(PROMPTS), cfg.n_kv_heads, n_slots, cfg.d_head)}
    assert cache.lengths == [len(prompt) + 4 for prompt in PROMPTS]


@pytest.mark.parametrize("window", [None, 4])
def test_rows_can_leave_and_be_repeated(window: int | None) -> None:
    _, decoder, state, cached = build(sliding_window=window)
    _, cache = cached.prefill(PROMPTS, SEQ_LEN)
    cached.extend([1, 2, 3, 4, 5], cache)
    rows = cache.select([4, 0, 0])
    cached.extend([6, 7, 8], rows)
    got = cached.extend([9, 10, 11], rows)
    want = [[*PROMPTS[4], 5, 6, 9], [*PROMPTS[0], 1, 7, 10], [*PROMPTS[0], 1, 8, 11]]
    torch.testing.assert_close(got, whole_pass(decoder, state, want), rtol=0, atol=1e-9)
    assert cache.lengths == [len(prompt) + 1 for prompt in PROMPTS], "select changed the original cache"


def test_a_capacity_drops_nothing_at_inference() -> None:
    _, _, _, dropless = build()
    _, dropping, state, capped = build(router={"capacity_factor": 0.5})
    want, _ = dropless.prefill(PROMPTS, SEQ_LEN)
    assert torch.equal(capped.prefill(PROMPTS, SEQ_LEN)[0], want)
    whole = whole_pass(dropping, state, [list(prompt) for prompt in PROMPTS])
    assert not torch.allclose(whole, want), "nothing was dropped, so this proves nothing"


def test_backends_agree() -> None:
    changes = {"d_head": 8, "d_model": 24, "d_expert": 16}
    cfg = tiny_config(seq_len=SEQ_LEN, **changes)
    outputs = []
    for backend in ("reference", "sorted_loop", "torch_grouped"):
        decoder = tiny_decoder(cfg, dtype=torch.float32, backend=backend)
        cached = CachedDecoder(decoder, random_state(cfg))
        _, cache = cached.prefill(PROMPTS, SEQ_LEN)
        outputs.append(cached.extend([1] * len(PROMPTS), cache))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
