"""Timing of a run: its speed between logged rows, and its longest phases, which a time limit must allow."""

import time

import torch

from turnout.moe.config import ModelConfig
from turnout.moe.flops import flops_per_token
from turnout.training.hardware import PeakFlops, peak_memory_gib
from turnout.training.metrics import Row
from turnout.training.parallel.groups import Groups


class MaxTimer:
    """Times phases and keeps the longest."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    def begin(self) -> None:
        self._begin_s = time.monotonic()

    def end(self) -> None:
        self.longest_s = max(self.longest_s, time.monotonic() - self._begin_s)


class Throughput:
    """Speed over all ranks since the last row."""

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
