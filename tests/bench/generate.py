"""What the KV cache saves: tokens/s with it, with whole passes, and of transformers on the same weights."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from transformers import MixtralForCausalLM

from tests.bench.rows import Row
from tests.bench.side_by_side import over, time_in_turn
from tests.models import tiny_decoder
from tests.unit.moe.test_mixtral_parity import build_mixtral, to_mixtral
from turnout.launch.settings import load_config
from turnout.moe.config import ModelConfig
from turnout.moe.kv_cache import CachedDecoder
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.generation.generate import whole_pass_logits

N_ROUNDS, N_PROMPT, N_NEW = 3, 16, 256
Write = Callable[[list[list[int]]], list[list[int]]]


def mixtral_like(recipe: str) -> ModelConfig:
    """Return the recipe's model without what Mixtral lacks, with the context of this benchmark."""
    changes = {"n_shared_experts": 0, "qk_norm": False, "tie_embeddings": False, "seq_len": N_PROMPT + N_NEW}
    return ModelConfig.model_validate({**load_config(recipe).model.model_dump(), **changes})


def by_whole_passes(decoder: Decoder, state: RouterState) -> Write:
    def write(prompts: list[list[int]]) -> list[list[int]]:
        rows = [list(prompt) for prompt in prompts]
        for _ in range(N_NEW):
            tokens = whole_pass_logits(decoder, rows, state).argmax(-1).tolist()
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        return rows

    return torch.no_grad()(write)


def by_cache(decoder: Decoder, state: RouterState) -> Write:
    model = CachedDecoder(decoder, state)

    def write(prompts: list[list[int]]) -> list[list[int]]:
        rows = [list(prompt) for prompt in prompts]
        logits, cache = model.prefill(rows, N_PROMPT + N_NEW)
        for i in range(N_NEW):
            tokens = logits.argmax(-1).tolist()
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            if i + 1 < N_NEW:
                logits = model.extend(tokens, cache)
        return rows

    return write


def by_transformers(decoder: Decoder, cfg: ModelConfig, experts: str) -> Write:
    model: MixtralForCausalLM = build_mixtral(cfg).float().eval()
    weights = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    model.load_state_dict(to_mixtral(weights, cfg), strict=True)
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation(experts)

    def write(prompts: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=N_NEW,
            min_new_tokens=N_NEW,
            do_sample=False,
            pad_token_id=0,
        )
        return out.tolist()

    return write


def generation_rows() -> list[Row]:
    """Measure greedy continuation in fp32, one thread."""
    torch.set_num_threads(1)
    rows = []
    for recipe, n_rows, has_slow in (("tiny", 1, True), ("tiny", 8, True), ("small", 1, False)):
        cfg = mixtral_like(recipe)
        decoder = tiny_decoder(cfg, dtype=torch.float32, gain=2.0).eval().requires_grad_(False)
        state = RouterState.initial(cfg)
        writers = {"cache": by_cache(decoder, state)}
        for experts in ("eager", "grouped_mm"):
            writers[f"transformers, {experts} experts"] = by_transformers(decoder, cfg, experts)
        if has_slow:
            writers["whole passes"] = by_whole_passes(decoder, state)
        rows += compare(f"{recipe}, {n_rows} rows", n_rows, cfg, writers)
    return rows


def compare(case: str, n_rows: int, cfg: ModelConfig, writers: dict[str, Write]) -> list[Row]:
    """Return the cache's tokens/s over the other writers', and how many of their tokens agree with it."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(cfg.vocab_size, (n_rows, N_PROMPT), generator=generator).tolist()
    texts: dict[str, list[list[int]]] = {}

    def writing(name: str) -> None:
        texts[name] = writers[name](prompts)

    seconds = time_in_turn({name: partial(writing, name) for name in writers}, n_rounds=N_ROUNDS)
    speed = {name: n_rows * N_NEW / statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name in list(writers)[1:]:
        is_same = [a == b for a, b in zip(flat(texts[name]), flat(texts["cache"]), strict=True)]
        note = f"{speed['cache']:,.0f} and {speed[name]:,.0f} tokens/s, "
        note += f"{sum(is_same) / len(is_same):.1%} of them the same"
        ratios = over(seconds[name], seconds["cache"])
        rows.append(Row.of(f"tokens/s of the cache over {name}, {case}", ratios, note=note))
    return rows


def flat(rows: list[list[int]]) -> list[int]:
    """Return the new tokens of all rows."""
    return [token for row in rows for token in row[N_PROMPT:]]
