"""A training step against other implementations on the same weights and batch: `python -m tests.bench step`.

Forward, backward and fused AdamW in bf16, one thread, each in a plain loop. The others are transformers'
model with those of its expert implementations that fit into memory, and our decoder with DeepSpeed's own
expert layer, dropless, instead of ours. Memory is measured in a separate process for each.
"""

import logging
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.rows import Row
from tests.bench.side_by_side import (
    GLIBC_DEFAULTS,
    MIB,
    in_ms,
    in_own_process,
    over,
    peak_extra_bytes,
    time_in_turn,
)
from tests.exports import DecoderWeights
from tests.models import tiny_config, tiny_decoder
from tests.unit.data_fixtures import write_tokenizer
from turnout.data.loader import Batch
from turnout.launch.ranks.launcher import CPU_ALLOCATOR
from turnout.moe.config import ModelConfig
from turnout.moe.layers import SwiGLU
from turnout.moe.load_balancing import RouterState, RouterStats
from turnout.moe.model import Decoder
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.training.export.hf_config import Architecture
from turnout.training.export.huggingface import write_huggingface
from turnout.training.objective import Objective

N_SEQS, SEQ_LEN = 8, 512
SHAPES: dict[str, tuple[Architecture, dict[str, int | bool]]] = {
    "E 8 k 2 F 1408": ("mixtral", {"n_experts": 8, "top_k": 2, "d_expert": 1408}),
    "E 64 k 8 F 512": ("qwen3_moe", {"n_experts": 64, "top_k": 8, "d_expert": 512, "qk_norm": True}),
}
SIZES = {"n_layers": 4, "d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_head": 64, "vocab_size": 32_000}
# Targets for our tokens/s and our memory, each over each of the others'.
AT_LEAST = {"E 8 k 2 F 1408": 2.0, "E 64 k 8 F 512": 3.0}
AT_MOST = 0.6
OURS = "compiled"  # the blocks, the loss and the experts' activations
OTHERS = ("transformers grouped_mm", "transformers eager", "deepspeed.moe")
Step = Callable[[], Tensor]  # returns the cross-entropy, in nats per token


def step_rows(n_rounds: int = 3) -> list[Row]:
    rows = []
    for shape in SHAPES:
        ours = in_own_process(peak_bytes, shape, OURS, malloc=GLIBC_DEFAULTS)
        for way in ("plain", *OTHERS):
            is_judged = way in OTHERS
            # In pairs: all models at once, with their moments and activations, would take 10 GiB.
            seconds = in_own_process(time_beside_ours, shape, way, n_rounds, malloc=CPU_ALLOCATOR)
            note = f"{in_ms(seconds[OURS])} and {in_ms(seconds[way])} of {N_SEQS * SEQ_LEN} tokens"
            least, ratios = AT_LEAST[shape] if is_judged else None, over(seconds[way], seconds[OURS])
            rows.append(Row.of(f"tokens/s over {way}, {shape}", ratios, at_least=least, note=note))
            theirs = in_own_process(peak_bytes, shape, way, malloc=GLIBC_DEFAULTS)
            note = f"{ours / MIB:,.0f} and {theirs / MIB:,.0f} MiB"
            most = AT_MOST if is_judged else None
            rows.append(Row.of(f"memory over {way}, {shape}", [ours / theirs], at_most=most, note=note))
    return rows


def time_beside_ours(shape: str, way: str, n_rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    steps, losses = {name: build(shape, name) for name in (OURS, way)}, dict[str, float]()

    def noting_first_loss(name: str) -> None:
        loss = steps[name]()
        losses.setdefault(name, float(loss))

    seconds = time_in_turn({name: partial(noting_first_loss, name) for name in steps}, n_rounds=n_rounds)
    assert math.isclose(*losses.values(), rel_tol=1e-3), f"the losses differ: {losses}"
    return seconds


def build(shape: str, way: str) -> Step:
    if way.startswith("transformers"):
        return their_step(shape, way.split()[1])
    decoder = built_decoder(shape, "compiled_loop" if way == OURS else "sorted_loop").bfloat16()
    if way == "deepspeed.moe":
        put_deepspeed_into(decoder)
        decoder.bfloat16()
    if way == OURS:
        decoder.compile_blocks()
    return our_step(decoder)


def built_decoder(shape: str, backend: str) -> Decoder:
    cfg = tiny_config(**SIZES, **SHAPES[shape][1], seq_len=SEQ_LEN)
    # Weights as they are at the start of training: larger ones would load the experts unevenly.
    return tiny_decoder(cfg, dtype=torch.float32, backend=backend, gain=1.0)


def synthetic_batch(cfg: ModelConfig, n_seqs: int) -> Batch:
    """Return sequences of one document each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.vocab_size, (n_seqs, cfg.seq_len + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(inputs, targets, doc_ids=torch.zeros_like(inputs), sample_ids=torch.arange(n_seqs))


def our_step(decoder: Decoder) -> Step:
    objective, state = Objective(decoder), RouterState.initial(decoder.cfg)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    batch = synthetic_batch(decoder.cfg, N_SEQS)

    def run() -> Tensor:
        optimizer.zero_grad()
        sums = objective(batch, state)
        (sums.total / batch.targets.numel()).backward()
        optimizer.step()
        return sums.nll / batch.targets.numel()

    return run


def their_step(shape: str, experts: str) -> Step:
    import transformers  # seconds to import, and only this side needs it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    decoder = built_decoder(shape, "reference")
    with tempfile.TemporaryDirectory() as name:
        weights = DecoderWeights(decoder, RouterState.initial(decoder.cfg), write_tokenizer(Path(name)))
        (directory := Path(name) / "hf").mkdir()
        write_huggingface(weights, SHAPES[shape][0], directory, dtype=torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, experts_implementation=experts, attn_implementation="sdpa"
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = synthetic_batch(decoder.cfg, N_SEQS)

    def run() -> Tensor:
        optimizer.zero_grad()
        logits = model(batch.tokens, use_cache=False, output_router_logits=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's expert layer with our weights and our interface."""

    def __init__(self, cfg: ModelConfig, ours: MoELayer) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE  # seconds to import, and only this side needs it

        self.layer = MoE(
            cfg.d_model,
            SwiGLU(cfg.d_model, cfg.d_expert, Unsplit(), "none"),
            num_experts=cfg.n_experts,
            k=cfg.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        inner = self.layer.deepspeed_moe
        with torch.no_grad():
            inner.gate.wg.weight.copy_(ours.router.weight)
            for i, expert in enumerate(inner.experts.deepspeed_experts):
                gate, up = ours.experts.gate_up[i].t().chunk(2)
                for matrix, weight in (("gate", gate), ("up", up), ("down", ours.experts.down[i])):
                    getattr(expert, matrix).weight.copy_(weight)

    def forward(self, x_TD: Tensor, *_: object) -> tuple[Tensor, RouterStats]:
        out_TD, balance, counts_E = self.layer(x_TD)
        zero = balance.new_zeros(())
        return out_TD, RouterStats(balance * x_TD.size(0), zero, counts_E, zero, zero, zero)


def put_deepspeed_into(decoder: Decoder) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for block in decoder.blocks:
        block.moe = DeepSpeedLayer(decoder.cfg, block.moe)


def peak_bytes(shape: str, way: str) -> int:
    """Return the peak growth of the process in two steps, in bytes: gradients and moments, not weights."""
    torch.set_num_threads(1)
    run = build(shape, way)

    def twice() -> None:
        run()
        run()

    return peak_extra_bytes(twice)
