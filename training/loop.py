"""The run as a story: build, train step by step, evaluate, sample."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data.corpus import Corpus, open_corpus
from moe.balance import RouterState, load_fractions
from moe.config import ModelConfig
from moe.counts import flops_per_token
from moe.model import Decoder
from training.batches import build_loader, prefetch
from training.build import build_engine
from training.config import RunConfig
from training.engine import DTYPES
from training.errors import NonFiniteError
from training.evaluate import evaluate
from training.generate import continue_prompts
from training.hardware import PeakFlops, peak_flops, peak_memory_gib
from training.metrics import MetricsLog, Row
from training.optimizer import lr_at
from training.parallel import Groups
from training.step import StepResult, advance_router_state, train_step

log = logging.getLogger("turnout")

# fp16 lowers its loss scale after an overflow; this many in a row means that no scale helps.
MAX_SKIPPED_IN_A_ROW = 50


@dataclass(frozen=True)
class Observer:
    """Who is told of the run on the first rank: rows of metrics, and texts under a name."""

    on_row: Callable[[Row], None]
    on_text: Callable[[str, str], None]


@dataclass
class Progress:
    """What has happened so far."""

    router_state: RouterState
    tokens_seen: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0


def train(cfg: RunConfig, run_dir: Path, groups: Groups, observer: Observer | None) -> None:
    """Run the whole of cfg on this rank; every rank calls it, and the first brings an observer.

    Raises ConfigError, DataError or NonFiniteError, each the same on every rank where the cause is shared.
    """
    # Checksums were verified before the ranks started.
    corpus = open_corpus(Path(cfg.data.corpus), verify="size")
    loader = build_loader(cfg, corpus)
    engine, decoder = build_engine(cfg, groups)
    progress = Progress(RouterState.initial(cfg.model, groups.device))
    peak = peak_flops(groups.device, DTYPES[cfg.train.precision])
    metrics = MetricsLog(run_dir, cfg.log.trackers, cfg.model_dump(mode="json")) if groups.is_first else None
    _log_choices(cfg, groups, peak)

    def record(row: Row) -> None:
        if metrics is not None and observer is not None:
            metrics.write(row)
            observer.on_row(row)

    clock = _Clock(cfg.model, groups, peak)
    for step, microbatches in prefetch(loader, cfg, groups.layout, groups.rank):
        n_done = step + 1
        with _naming_step(n_done):
            schedule_lr = lr_at(step, lr=cfg.optim.lr, schedule=cfg.optim.schedule, n_steps=cfg.train.n_steps)
            result = train_step(
                engine, microbatches, progress.router_state, step=n_done, lr=schedule_lr, groups=groups
            )
            _note(progress, result, cfg)
            clock.count(cfg.train.batch_tokens)
            is_last = n_done == cfg.train.n_steps
            row: Row = {"step": n_done}
            if is_last or n_done % cfg.log.every_steps == 0:
                row |= _step_row(result, progress, schedule_lr, engine.loss_scale) | clock.row()
            if is_last or _is_due(n_done, cfg.eval.every_steps):
                groups.ledger.at(n_done, "evaluation")
                row |= _evaluation_row(cfg, decoder, corpus, progress, groups)
                clock.restart()
            if len(row) > 1:
                record(row)
            groups.ledger.at(n_done, "data")
    groups.ledger.at(cfg.train.n_steps, "sampling")
    for prompt, text in _samples(cfg, decoder, corpus, progress):
        if metrics is not None and observer is not None:
            metrics.write_text("sample", f"**{prompt}**{text}", cfg.train.n_steps)
            observer.on_text(prompt, text)
    if metrics is not None:
        metrics.close()
    engine.close()


@contextmanager
def _naming_step(n_done: int) -> Iterator[None]:
    """Put the step into what went wrong in it, a lost peer too, which may be noticed in any collective."""
    try:
        yield
    except RuntimeError as err:
        err.add_note(f"step {n_done}")
        raise


def _is_due(n_done: int, every_steps: int | None) -> bool:
    return every_steps is not None and n_done % every_steps == 0


def _note(progress: Progress, result: StepResult, cfg: RunConfig) -> None:
    """Take a step's outcome into the progress; stop where it was not applied and no loss scale can help."""
    progress.router_state = advance_router_state(progress.router_state, result, cfg.model.balance)
    progress.tokens_seen += cfg.train.batch_tokens
    if result.outcome.was_applied:
        progress.n_skipped_in_a_row = 0
        return
    progress.n_skipped += 1
    progress.n_skipped_in_a_row += 1
    if cfg.train.precision != "fp16" or progress.n_skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteError(
            f"the gradient norm is {result.outcome.grad_norm} though the loss is {float(result.loss):.4g}; "
            f"the update was not applied. Lower optim.lr, or use bf16"
        )


def _step_row(result: StepResult, progress: Progress, lr: float, loss_scale: float) -> Row:
    return {
        "train/loss": float(result.loss),
        "train/grad_norm": result.outcome.grad_norm,
        "train/lr": lr,
        "train/balance_loss": float(result.balance_loss),
        "train/z_loss": float(result.z_loss),
        "train/tokens_seen": progress.tokens_seen,
        "train/skipped_steps": progress.n_skipped,
        "train/loss_scale": loss_scale,
        "router/max_load_frac": float(load_fractions(result.counts_ME).max()),
        "router/entropy_nats": float(result.entropy),
        "router/dropped_tokens": int(result.n_dropped),
    }


def _evaluation_row(
    cfg: RunConfig, decoder: Decoder, corpus: Corpus, progress: Progress, groups: Groups
) -> Row:
    evaluation = evaluate(
        decoder,
        corpus,
        progress.router_state,
        groups,
        microbatch_seqs=cfg.train.microbatch_seqs,
        max_documents=cfg.eval.max_documents,
    )
    return {
        "eval/loss": evaluation.loss,
        "eval/bits_per_byte": evaluation.bits_per_byte,
        "eval/n_documents": evaluation.n_documents,
        "eval/n_bytes": evaluation.n_bytes,
    }


def _samples(cfg: RunConfig, decoder: Decoder, corpus: Corpus, progress: Progress) -> list[tuple[str, str]]:
    if not cfg.sample.prompts:
        return []
    tokenizer = corpus.load_tokenizer()
    texts = continue_prompts(decoder, tokenizer, progress.router_state, cfg.sample, seed=cfg.train.seed)
    return list(zip(cfg.sample.prompts, texts, strict=True))


def _log_choices(cfg: RunConfig, groups: Groups, peak: PeakFlops) -> None:
    layout = groups.layout
    log.info(
        "rank %d of %d: dp=%d tp=%d ep=%d, ZeRO-%d, %s, experts by %s, device %s, peak %.3g FLOP/s (%s)",
        groups.rank,
        layout.world_size,
        layout.dp,
        layout.tp,
        layout.ep,
        cfg.parallel.zero_stage,
        cfg.train.precision,
        cfg.train.expert_backend,
        groups.device,
        peak.flops_per_s,
        peak.source,
    )


class _Clock:
    """Speed since the last row, over all ranks."""

    def __init__(self, model: ModelConfig, groups: Groups, peak: PeakFlops) -> None:
        self._flops_per_token, self._groups, self._peak = flops_per_token(model), groups, peak
        self.restart()

    def restart(self) -> None:
        self._start, self._n_tokens, self._n_steps = time.perf_counter(), 0, 0

    def count(self, batch_tokens: int) -> None:
        self._n_tokens += batch_tokens
        self._n_steps += 1

    def row(self) -> Row:
        elapsed_s = time.perf_counter() - self._start
        tokens_per_s = self._n_tokens / elapsed_s
        peak_flops_per_s = self._peak.flops_per_s * self._groups.layout.world_size
        memory = torch.tensor(peak_memory_gib(self._groups.device), device=self._groups.device)
        row: Row = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_ms": 1000 * elapsed_s / self._n_steps,
            "perf/mfu_frac": tokens_per_s * self._flops_per_token / peak_flops_per_s,
            "mem/peak_gib": float(self._groups.max_over_ranks(memory)),
        }
        self.restart()
        return row
