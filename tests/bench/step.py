"""A whole training step against transformers' on the same weights and batch: `python -m tests.bench step`.

Forward, backward and AdamW in bf16, one thread, a plain loop on both sides; transformers with those of its
ways to compute experts that fit into memory. For its memory each is run in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Batch
from moe.balance import RouterState
from moe.config import ModelConfig
from tests.bench.side_by_side import MIB, peak_extra_bytes, time_in_turn, without_allocator
from tests.exports import DecoderWeights
from tests.models import tiny_config, tiny_decoder
from tests.unit.data_fixtures import write_tokenizer
from training.export.huggingface import write_huggingface
from training.export.naming import Architecture
from training.objective import Objective

N_SEQS, SEQ_LEN = 8, 512
SHAPES: dict[str, tuple[Architecture, dict[str, int | bool]]] = {
    "E 8 k 2 F 1408": ("mixtral", {"n_experts": 8, "top_k": 2, "d_expert": 1408}),
    "E 64 k 8 F 512": ("qwen3_moe", {"n_experts": 64, "top_k": 8, "d_expert": 512, "qk_norm": True}),
}
SIZES = {"n_layers": 4, "d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_head": 64, "vocab_size": 32_000}
EXPERTS = ("grouped_mm", "eager")
Step = Callable[[], None]


def model_config(shape: str) -> ModelConfig:
    return tiny_config(**SIZES, **SHAPES[shape][1], seq_len=SEQ_LEN)


def made_up_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SIZES["vocab_size"], (N_SEQS, SEQ_LEN + 1), generator=generator)


def our_step(shape: str) -> Step:
    decoder = tiny_decoder(model_config(shape), dtype=torch.float32, backend="sorted_loop").bfloat16()
    objective, state = Objective(decoder), RouterState.initial(decoder.cfg)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    tokens = made_up_tokens()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    batch = Batch(
        tokens=inputs, targets=targets, doc_ids=torch.zeros_like(inputs), sample_ids=torch.arange(N_SEQS)
    )

    def run() -> None:
        optimizer.zero_grad()
        (objective(batch, state).total / targets.numel()).backward()
        optimizer.step()

    return run


def their_step(shape: str, experts: str) -> Step:
    import transformers  # seconds to import, and only this side needs it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    architecture, _ = SHAPES[shape]
    decoder = tiny_decoder(model_config(shape), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as name:
        weights = DecoderWeights(decoder, RouterState.initial(decoder.cfg), write_tokenizer(Path(name)))
        (place := Path(name) / "hf").mkdir()
        write_huggingface(weights, architecture, place, dtype=torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.bfloat16, experts_implementation=experts, attn_implementation="sdpa"
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = made_up_tokens()

    def run() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1], use_cache=False, output_router_logits=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return run


def build(shape: str, way: str) -> Step:
    return our_step(shape) if way == "turnout" else their_step(shape, way)


def print_step_speed() -> None:
    torch.set_num_threads(1)
    n_tokens = N_SEQS * SEQ_LEN
    for shape in SHAPES:
        print(f"\n### training step of {shape}, 4 layers, d 512, V 32,000, {n_tokens} tokens, bf16\n")
        print("| way | ms | tokens/s | time of transformers' fastest over this | extra MiB |")
        print("|---|---|---|---|---|")
        timings = time_in_turn({way: build(shape, way) for way in ("turnout", *EXPERTS)}, n_rounds=3)
        fastest = min(timings[way].ms for way in EXPERTS)
        for way, found in timings.items():
            extra = json.loads(_alone(shape, way)) / MIB
            speed = 1e3 * n_tokens / found.ms
            print(
                f"| {way} | {found.ms:,.0f} | {speed:,.0f} | {fastest / found.ms:.2f} | {extra:,.0f} |",
                flush=True,
            )


def _alone(shape: str, way: str) -> str:
    words = [sys.executable, "-m", "tests.bench.step", shape, way]
    said = subprocess.run(words, capture_output=True, text=True, timeout=900, env=without_allocator())
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()[-1]


def print_peak(shape: str, way: str) -> None:
    """Print by how much two steps make the process grow beyond its weights; gradients and moments count."""
    torch.set_num_threads(1)
    run = build(shape, way)

    def twice() -> None:
        run()
        run()

    print(peak_extra_bytes(twice))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print_peak(*sys.argv[1:])
    else:
        print_step_speed()
