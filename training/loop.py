"""A run on one rank, from top to bottom: build what it needs, resume from the newest checkpoint, take step
after step, and once in a while log, evaluate and save; at the end write samples.

What a step computes is in training/step.py, and what follows a step that went wrong in
training/guard_policy.py.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from turnout.data.corpus import open_corpus
from turnout.data.loader import Batch
from turnout.data.skips import SkippedWindow, data_step_at, merged, read_skips, write_skips
from turnout.moe.load_balancing import RouterState, load_fractions
from turnout.training.batches import build_loader, prefetch
from turnout.training.checkpoint.manifest import Attached, Manifest, SavedLayout
from turnout.training.checkpoint.rank_state import rank_state_of, restore
from turnout.training.checkpoint.saver import Saver
from turnout.training.checkpoint.tensor_files import TensorReader
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_engine
from turnout.training.errors import DivergedError, SaveError, TakenOverError
from turnout.training.evaluation.held_out import evaluate
from turnout.training.generation.generate import continue_prompts
from turnout.training.guard_policy import GuardPolicy, Intervention
from turnout.training.hardware import DTYPES, expert_backend_of, peak_flops
from turnout.training.metrics import MetricsLog, Row
from turnout.training.optimizers.schedule import lr_at
from turnout.training.parallel.groups import Groups
from turnout.training.progress import Progress
from turnout.training.run_control import FencingToken, State, Status, StopFile
from turnout.training.step import StepResult, advance_router_state, train_step
from turnout.training.throughput import MaxTimer, Throughput

log = logging.getLogger("turnout")

SKIPPED_FILE = "skipped.json"  # in the run directory: data left out, known before any checkpoint holds it


@dataclass(frozen=True)
class Observer:
    """Callbacks of whoever watches the run, called on the first rank only.

    on_row: a row of metrics. on_text: a sample, as prompt and continuation. on_event: one line on something
    unusual. on_status: where the attempt stands.
    """

    on_row: Callable[[Row], None]
    on_text: Callable[[str, str], None]
    on_event: Callable[[str], None]
    on_status: Callable[[Status], None]


def train(
    cfg: RunConfig,
    run_dir: Path,
    groups: Groups,
    observer: Observer | None,
    *,
    fencing_token: FencingToken,
    attached: Attached,
    attempt_dir: Path,
) -> None:
    """Train cfg on this rank, from the run's newest checkpoint to the last step, or until asked to stop.

    Every rank calls this; only the first has an observer. attempt_dir: where this attempt's stop file
    appears.

    Raises ConfigError, DataError, CheckpointError, DivergedError, SaveError or TakenOverError: the same one
    on every rank where the ranks share the cause.
    """
    run = Run(cfg, run_dir, groups, observer, fencing_token, attached, StopFile(attempt_dir, groups))
    run.resume()
    try:
        while run.progress.step < cfg.train.n_steps:
            intervention = run.train_steps()
            if intervention is not None:
                run.roll_back(intervention)
            elif run.progress.step < cfg.train.n_steps:
                run.stop_early()
                return
    # Every rank raises it at the same step, so a save in the background can still finish.
    except DivergedError:
        run.wait_saved()
        raise
    run.write_samples()
    run.close("done")


class Run:
    """One rank's part of a run."""

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        groups: Groups,
        observer: Observer | None,
        fencing_token: FencingToken,
        attached: Attached,
        stop_file: StopFile,
    ) -> None:
        """Build what the run needs, and log what was chosen."""
        self.cfg, self.run_dir, self.groups, self._observer = cfg, run_dir, groups, observer
        # Size only: the command verified the checksums before it started the ranks.
        self._corpus = open_corpus(Path(cfg.data.corpus), verify="size")
        self._loader = build_loader(cfg, self._corpus)
        self._engine, self._decoder = build_engine(cfg, groups)
        self.progress = Progress(RouterState.initial(cfg.model, groups.device))
        layout = groups.layout
        self._layout = SavedLayout(
            world_size=layout.world_size, tp=layout.tp, ep=layout.ep, zero_stage=cfg.parallel.zero_stage
        )
        self._saver = Saver(run_dir, groups, cfg.checkpoint, fencing_token, attached, self._layout)
        self._metrics: MetricsLog | None = None
        peak = peak_flops(groups.device, DTYPES[cfg.train.precision])
        self._throughput = Throughput(cfg.model, groups, peak)
        self._stop_file, self._gap = stop_file, MaxTimer()
        log.info(
            "rank %d of %d: dp=%d tp=%d ep=%d, ZeRO-%d, %s, experts by %s, device %s, peak %.3g FLOP/s (%s)",
            groups.rank,
            layout.world_size,
            layout.dp,
            layout.tp,
            layout.ep,
            cfg.parallel.zero_stage,
            cfg.train.precision,
            expert_backend_of(cfg, groups.device),
            groups.device,
            peak.flops_per_s,
            peak.source,
        )

    def resume(self) -> None:
        """Restore the newest intact checkpoint, if the run has one. Collective. Raises CheckpointError."""
        skipped = read_skips(self.run_dir / SKIPPED_FILE)
        found = self._saver.find_intact(self._report)
        if found is not None:
            self._restore(*found, skipped)
            return
        self.progress = replace(self.progress, skipped=skipped, n_interventions=len(skipped))
        self._open_metrics()

    def _restore(self, path: Path, manifest: Manifest, skipped: tuple[SkippedWindow, ...]) -> None:
        reader = TensorReader(path, manifest)
        router_state = restore(reader, self._engine, self.progress.router_state, self.groups)
        self.progress = Progress.restored(router_state, manifest.state, skipped)
        saved, now = manifest.saved_layout, self._layout
        self._report(f"resuming from {path}" + ("" if saved == now else f", saved with {saved}, now {now}"))
        self._open_metrics()

    def train_steps(self) -> Intervention | None:
        """Train to the last step, to the step boundary at which the run is asked to stop, or to a step after
        which the run must roll back; return the reason for a rollback.
        """
        cfg, groups, progress = self.cfg, self.groups, self.progress
        policy = GuardPolicy(cfg, groups, progress)
        self._throughput.restart()
        self._gap.begin()
        with prefetch(
            self._loader,
            cfg,
            groups.layout,
            groups.rank,
            start_step=progress.step,
            data_step_at=lambda step: data_step_at(step, progress.skipped),
        ) as batches:
            for step, microbatches in batches:
                with _naming_step(step + 1):
                    result, intervention = self._take_step(step, microbatches, policy)
                    if intervention is not None and intervention.action == "rollback":
                        return intervention
                    is_last = progress.step == cfg.train.n_steps
                    row: Row = {"step": progress.step}
                    if is_last or progress.step % cfg.log.every_steps == 0:
                        row |= _step_row(result, progress, self._lr_at(step), self._engine.loss_scale)
                        row |= self._throughput.row()
                    if is_last or _is_due(progress.step, cfg.eval.every_steps):
                        row |= self._evaluate()
                    if len(row) > 1:
                        self._log(row)
                    if is_last or _is_due(progress.step, cfg.checkpoint.every_steps):
                        self.save()
                    self._gap.end()
                    if self._stop_file.is_there():
                        return None
                    self._gap.begin()
                    groups.recorder.enter_phase(progress.step, "data")
        return None

    def _take_step(
        self, step: int, microbatches: list[Batch], policy: GuardPolicy
    ) -> tuple[StepResult, Intervention | None]:
        """Take one optimizer step and record its outcome in the progress. step counts from 0."""
        cfg, progress = self.cfg, self.progress
        self._saver.poll()
        result = train_step(
            self._engine,
            microbatches,
            progress.router_state,
            step=step + 1,
            lr=self._lr_at(step),
            groups=self.groups,
            is_wanted=policy.is_wanted,
        )
        intervention = policy.intervention(result)
        progress.step, was_applied = step + 1, result.outcome.was_applied
        progress.router_state = advance_router_state(progress.router_state, result, cfg.model.balance)
        progress.tokens_seen += cfg.train.batch_tokens
        progress.n_skipped += not was_applied
        progress.n_skipped_in_a_row = 0 if was_applied else progress.n_skipped_in_a_row + 1
        if intervention is not None and intervention.action == "skip":
            progress.n_interventions += 1
            self._report(f"step {step + 1}: {intervention.anomaly.text}; its update was skipped")
        self._throughput.count(cfg.train.batch_tokens)
        return result, intervention

    def _lr_at(self, step: int) -> float:
        cfg = self.cfg
        return lr_at(step, lr=cfg.optim.lr, schedule=cfg.optim.schedule, n_steps=cfg.train.n_steps)

    def _evaluate(self) -> Row:
        self.groups.recorder.enter_phase(self.progress.step, "evaluation")
        found = evaluate(
            self._decoder,
            self._corpus,
            self.progress.router_state,
            self.groups,
            microbatch_seqs=self.cfg.train.microbatch_seqs,
            max_documents=self.cfg.eval.max_documents,
        )
        self._throughput.restart()
        return {
            "eval/loss": found.loss,
            "eval/bits_per_byte": found.bits_per_byte,
            "eval/n_documents": found.n_documents,
            "eval/n_bytes": found.n_bytes,
        }

    def _log(self, row: Row) -> None:
        if self._metrics is not None and self._observer is not None:
            self._metrics.write(row)
            self._observer.on_row(row)
            self._report_status("training")

    def save(self) -> None:
        """Save this step, in the background where checkpoint.async_save is set. Collective."""
        self.groups.recorder.enter_phase(self.progress.step, "checkpoint")
        rank_state = rank_state_of(self._engine, self.progress.router_state, self.groups)
        scalars, scaler = self._engine.optimizer_scalars(), self._engine.loss_scaler_state()
        self._saver.save(rank_state, self.progress.to_state(optimizer=scalars, loss_scaler=scaler))

    def roll_back(self, intervention: Intervention) -> None:
        """Restore the newest intact checkpoint, and leave out the data that led here. Collective.

        Raises DivergedError where there is no checkpoint yet, CheckpointError where none is intact.
        """
        here, step, found_text = self.progress, self.progress.step, intervention.anomaly.text
        last = data_step_at(step - 1, here.skipped)
        found = self._saver.find_intact(self._report)
        if found is None:
            raise DivergedError(
                f"step {step}: {found_text}, but there is no checkpoint to roll back to yet; lower "
                "checkpoint.every_steps, or lower optim.lr"
            )
        # Only data after the checkpoint: the run has learned from what came before, which keeps its place.
        first_unread = data_step_at(found[1].state.step, here.skipped)
        assert self.cfg.guard.skip_window_steps is not None, "GuardConfig fills it in"
        first = max(first_unread, last + 1 - self.cfg.guard.skip_window_steps)
        window = SkippedWindow(first, last, f"step {step}: {found_text}")
        skipped = merged(here.skipped, [window])
        # On disk before training continues, so that a kill does not lead back into the same data.
        if self.groups.is_first:
            write_skips(self.run_dir / SKIPPED_FILE, skipped)
        self._report(f"step {step}: {found_text}; rolling back, without data steps {first} to {last}")
        self._restore(*found, skipped)
        self.progress.n_interventions = here.n_interventions + 1

    def wait_saved(self) -> None:
        """Wait for a save in the background, in a run that ends for another reason."""
        try:
            self._saver.wait()
        except (SaveError, TakenOverError) as err:
            self._report(str(err))

    def stop_early(self) -> None:
        """Save this step, unless that has been done, and end; --resume continues from it."""
        if self._saver.newest_step != self.progress.step:
            self.save()
        self.close("saved")

    def write_samples(self) -> None:
        """Continue the prompts of sample.prompts with the trained model. Collective."""
        cfg, step = self.cfg, self.progress.step
        self.groups.recorder.enter_phase(step, "sampling")
        if not cfg.sample.prompts:
            return
        tokenizer, state = self._corpus.load_tokenizer(), self.progress.router_state
        texts = continue_prompts(self._decoder, tokenizer, state, cfg.sample, seed=cfg.train.seed)
        for prompt, text in zip(cfg.sample.prompts, texts, strict=True):
            if self._metrics is not None and self._observer is not None:
                self._metrics.write_text("sample", f"**{prompt}**{text}", step)
                self._observer.on_text(prompt, text)

    def close(self, state: State) -> None:
        """Wait for the last checkpoint, and end. Raises SaveError or TakenOverError if that fails.

        state: what the status file says of this attempt from now on.
        """
        self.groups.recorder.enter_phase(self.progress.step, "last checkpoint")
        self._saver.close()
        if state == "saved":
            self._report(
                f"stopped after step {self.progress.step}, as asked, and saved; --resume continues from there"
            )
        self._report_status(state)
        if self._metrics is not None:
            self._metrics.close()
        self._engine.close()

    def _open_metrics(self) -> None:
        """Open metrics.jsonl and the trackers on the first rank, without rows after this step."""
        if self._metrics is not None:
            self._metrics.close()
        if self.groups.is_first:
            config, step = self.cfg.model_dump(mode="json"), self.progress.step
            self._metrics = MetricsLog(self.run_dir, self.cfg.log.trackers, config, after_step=step)

    def _report(self, event: str) -> None:
        log.info(event)
        if self._observer is not None:
            self._observer.on_event(event)

    def _report_status(self, state: State) -> None:
        if self._observer is not None:
            longest = (self._gap.longest_s, self._saver.longest_s)
            self._observer.on_status(Status(state, self.progress.step, *longest))


@contextmanager
def _naming_step(n_done: int) -> Iterator[None]:
    """Add the step to an error raised in it; any collective may be the one that notices a lost peer."""
    try:
        yield
    except RuntimeError as err:
        err.add_note(f"step {n_done}")
        raise


def _is_due(n_done: int, every_steps: int | None) -> bool:
    return every_steps is not None and n_done % every_steps == 0


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
        "router/dropped_rows": int(result.n_dropped),
        "perf/extra_chunks": int(result.n_extra_chunks),
    }
