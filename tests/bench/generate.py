"""What the cache saves: tokens/s of whole passes, of the cache, and of transformers on the same weights."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import MixtralForCausalLM

from launch.settings import load_config
from moe.balance import RouterState
from moe.cache import CachedDecoder
from moe.config import ModelConfig
from moe.model import Decoder
from tests.models import tiny_decoder
from tests.unit.test_mixtral_parity import build_mixtral, to_mixtral
from training.generate import whole_pass_logits

N_ROUNDS, N_PROMPT, N_NEW = 3, 16, 256
Write = Callable[[list[list[int]]], list[list[int]]]


def mixtral_like(recipe: str) -> ModelConfig:
    """Return the recipe's model without what Mixtral has not, as long as the text is."""
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


def print_generation_speed() -> None:
    print(f"\n### Greedy continuation of {N_PROMPT} tokens by {N_NEW}, fp32, one thread, by CPU seconds\n")
    print("| model | rows | by | tokens/s | spread | ratio to the cache | tokens as the cache |")
    print("|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for recipe, n_rows, has_slow in (("tiny", 1, True), ("tiny", 8, True), ("small", 1, False)):
        cfg = mixtral_like(recipe)
        decoder = tiny_decoder(cfg, dtype=torch.float32, gain=2.0).eval().requires_grad_(False)
        state = RouterState.initial(cfg)
        writers = {"cache": by_cache(decoder, state)}
        for experts in ("eager", "grouped_mm"):
            writers[f"transformers, {experts} experts"] = by_transformers(decoder, cfg, experts)
        if has_slow:
            writers["whole passes"] = by_whole_passes(decoder, state)
        compare(recipe, n_rows, cfg, writers)


def compare(recipe: str, n_rows: int, cfg: ModelConfig, writers: dict[str, Write]) -> None:
    """Measure all writers N_ROUNDS times in turn; each ratio is within one round."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(cfg.vocab_size, (n_rows, N_PROMPT), generator=generator).tolist()
    speeds: dict[str, list[float]] = {name: [] for name in writers}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(N_ROUNDS):
        for name, write in writers.items():
            # Of this process, which has one thread: what else the machine does is not counted.
            start_s = time.process_time()
            texts[name] = write(prompts)
            speeds[name].append(n_rows * N_NEW / (time.process_time() - start_s))
    for name, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, speeds["cache"], strict=True))
        same = sum(a == b for a, b in zip(flat(texts[name]), flat(texts["cache"]), strict=True))
        share = same / len(flat(texts["cache"]))
        print(
            f"| {recipe} | {n_rows} | {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to "
            f"{max(found):,.0f} | {ratio:.3f} | {share:.1%} |",
            flush=True,
        )


def flat(rows: list[list[int]]) -> list[int]:
    """Return the new tokens of all rows."""
    return [token for row in rows for token in row[N_PROMPT:]]
