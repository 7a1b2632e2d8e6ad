"""Small run configs and corpora of random tokens for tests that train."""

import json
from pathlib import Path
from typing import Any

import torch

from turnout.data.loader import IGNORE_INDEX, Batch
from turnout.training.config.run import RunConfig


def run_config(**changes: Any) -> RunConfig:
    """Return a small RunConfig. Keywords are whole or partial sections, such as model={"top_k": 1}."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "n_layers": 2,
            "d_model": 16,
            "n_heads": 2,
            "n_kv_heads": 1,
            "d_head": 8,
            "d_expert": 8,
            "n_experts": 6,
            "top_k": 2,
            "vocab_size": 40,
            "seq_len": 12,
        },
        "train": {"n_steps": 20, "batch_tokens": 96, "microbatch_seqs": 2, "clip_norm": 0.5, "seed": 3},
        "optim": {"lr": 0.05, "schedule": {"warmup_steps": 3}},
        "data": {"corpus": "unused"},
        "sample": {"n_tokens": 4},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return RunConfig.model_validate(tree)


def uneven_batch(cfg: RunConfig, step: int) -> Batch:
    """Return the global batch of a step. Sequence i: two documents, about 1 / (i + 1) of its targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    n_seqs, seq_len = cfg.batch_seqs, cfg.model.seq_len
    stream = torch.randint(cfg.model.vocab_size, (n_seqs, seq_len + 1), generator=generator)
    tokens, targets = stream[:, :-1].clone(), stream[:, 1:].clone()
    kept_frac = 1.0 / torch.arange(1, n_seqs + 1)
    targets[torch.rand(n_seqs, seq_len, generator=generator) > kept_frac[:, None]] = IGNORE_INDEX
    targets[:, 0] = stream[:, 1]  # no sequence is masked completely
    doc_ids = (torch.arange(seq_len) >= seq_len // 3).long().repeat(n_seqs, 1)
    return Batch(tokens, targets, doc_ids, torch.arange(n_seqs) + step * n_seqs)


def rank_batch(batch: Batch, dp_rank: int, dp: int) -> Batch:
    """Return the consecutive sequences of one data-parallel rank."""
    per_rank = batch.tokens.size(0) // dp
    rows = slice(dp_rank * per_rank, (dp_rank + 1) * per_rank)
    return Batch(batch.tokens[rows], batch.targets[rows], batch.doc_ids[rows], batch.sample_ids[rows])


def read_rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
