"""A model under the engine on one GPU, or in tiny sizes on the CPU where DRY=1, with a batch to train on."""

import os
from functools import partial

import torch
from torch import nn

from turnout.data.loader import Batch
from turnout.launch.ranks.launcher import free_port
from turnout.launch.settings import load_config
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder, build_decoder
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import put_under_engine
from turnout.training.hardware import expert_backend_of
from turnout.training.objective import Objective
from turnout.training.optimizers.adamw import build_adamw
from turnout.training.parallel.flight_recorder import NullRecorder
from turnout.training.parallel.groups import Groups, join_groups
from turnout.training.parallel.layout import plan_layout
from turnout.training.step import StepResult, train_step

DRY = os.environ.get("DRY") == "1"
DEVICE = torch.device("cpu") if DRY else torch.device("cuda", 0)
ON_GPU = DEVICE.type == "cuda"
DOCUMENTS_PER_SEQ = 5  # about
TINY = {
    "model": "n_layers=2 d_model=64 n_heads=4 n_kv_heads=2 d_head=16 d_expert=32 n_experts=8 top_k=2 "
    "vocab_size=512 seq_len=128",
    "train": "batch_tokens=512 microbatch_seqs=2",
}
SMALL = {"model": "n_layers=8", "train": "batch_tokens=65536 microbatch_seqs=16"}
BIG = {
    "model": "n_layers=4 d_model=2048 n_heads=16 n_kv_heads=4 d_head=128 d_expert=1024 n_experts=64 top_k=8 "
    "vocab_size=50304 seq_len=4096",
    "train": "batch_tokens=65536 microbatch_seqs=4",
}
# Changes to the recipe `small`, by section.
SIZES = {"small": TINY, "big": TINY} if DRY else {"small": SMALL, "big": BIG}


def config_of(size: str, *settings: str) -> RunConfig:
    """Return the recipe `small` in one of SIZES, with further settings."""
    changes = [f"{section}.{word}" for section, words in SIZES[size].items() for word in words.split()]
    return load_config("small", [*changes, *settings])


def join_as_only_rank() -> Groups:
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(rank | address)
    layout = plan_layout(config_of("small"), 1)
    return join_groups(layout, DEVICE, timeout_s=60, recorder=NullRecorder())


class Trainer:
    """A model under the engine, and one batch of random documents that every step trains on."""

    def __init__(self, size: str, backend: str, groups: Groups, *, compiles: bool = False) -> None:
        self.cfg = config_of(
            size,
            f"train.expert_backend={backend}",
            f"train.compile={str(compiles).lower()}",
            "train.precision=bf16",
        )
        self.groups = groups
        objective = Objective(build_random_decoder(self.cfg, groups))
        self.engine = put_under_engine(objective, self.cfg, groups, partial(build_adamw, cfg=self.cfg.optim))
        self.router_state = RouterState.initial(self.cfg.model, DEVICE)
        self.microbatches = split_microbatches(random_batch(self.cfg), self.cfg.train.microbatch_seqs)
        self.n_steps = 0

    def step(self) -> StepResult:
        self.n_steps += 1
        return train_step(
            self.engine,
            self.microbatches,
            self.router_state,
            step=self.n_steps,
            lr=1e-4,
            groups=self.groups,
        )


def build_random_decoder(cfg: RunConfig, groups: Groups) -> Decoder:
    """Build the decoder as a run on one rank does, except that the device draws the initial weights.

    A run draws them on the CPU, which takes seconds for each billion.
    """
    decoder = build_decoder(
        cfg.model,
        device=DEVICE,
        dispatcher=groups.dispatcher(),
        tp=groups.tensor_parallel(),
        expert_backend=expert_backend_of(cfg, DEVICE),
        recompute=cfg.train.recompute,
    )
    if cfg.train.compile:
        decoder.compile_blocks()
    torch.manual_seed(0)
    fill_randomly(decoder)
    return decoder


@torch.no_grad()
def fill_randomly(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02)


def random_batch(cfg: RunConfig) -> Batch:
    n_seqs, seq_len = cfg.batch_seqs, cfg.model.seq_len
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.model.vocab_size, (n_seqs, seq_len + 1), generator=generator)
    starts = torch.rand(n_seqs, seq_len, generator=generator) < (DOCUMENTS_PER_SEQ - 1) / seq_len
    starts[:, 0] = False
    doc_ids = starts.long().cumsum(1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(inputs, targets, doc_ids, torch.arange(n_seqs))
