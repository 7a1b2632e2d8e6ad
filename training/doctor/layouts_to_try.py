"""The runs of one config that `turnout doctor` compares: every layout that fits, and ways to split its batch.

Pure: a config and a number of ranks in, variants out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout, divisors, misfits, plan_layout

TIGHT = 0.4  # of parallel.ep_max_load: below 1 any routing needs extra chunks, here at least two


@dataclass(frozen=True)
class Variant:
    """One way to train on the same batches.

    n_microbatches  per rank and step
    n_chunks        parallel.ep_chunks
    max_load        parallel.ep_max_load; None: the config's own
    """

    layout: Layout
    zero_stage: Literal[1, 2] = 1
    sequence_parallel: bool = False
    n_microbatches: int = 1
    n_chunks: int = 1
    max_load: float | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __str__(self) -> str:
        layout = self.layout
        words = [f"dp={layout.dp} tp={layout.tp} ep={layout.ep} zero={self.zero_stage}"]
        if self.sequence_parallel:
            words.append("sequence-parallel")
        if self.n_microbatches > 1:
            words.append(f"micro-batches={self.n_microbatches}")
        if self.n_chunks > 1:
            words.append(f"chunks={self.n_chunks}")
        if self.max_load is not None:
            words.append(f"max-load={self.max_load}")
        if self.recompute != "none":
            words.append(f"recompute={self.recompute}")
        if self.precision != "fp32":
            words.append(self.precision)
        return " ".join(words)

    def apply(self, cfg: RunConfig) -> RunConfig:
        """Return cfg with this variant's settings. Raises ConfigError if they do not fit."""
        parallel = {
            "tp": self.layout.tp,
            "ep": self.layout.ep,
            "zero_stage": self.zero_stage,
            "sequence_parallel": self.sequence_parallel,
            "ep_chunks": self.n_chunks,
            "ep_max_load": cfg.parallel.ep_max_load if self.max_load is None else self.max_load,
        }
        train = {
            "microbatch_seqs": cfg.batch_seqs // (self.layout.dp * self.n_microbatches),
            "recompute": self.recompute,
            "precision": self.precision,
        }
        changed = cfg.model_copy(
            update={
                "parallel": cfg.parallel.model_copy(update=parallel),
                "train": cfg.train.model_copy(update=train),
            }
        )
        plan_layout(changed, self.layout.world_size)
        return changed


def split_layouts(cfg: RunConfig, world_size: int) -> tuple[list[Layout], dict[Layout, str]]:
    """Return the layouts of world_size ranks that fit the model, and for the others the reason why not."""
    fitting, refused = [], {}
    for tp in divisors(world_size):
        for ep in divisors(world_size):
            layout = Layout(world_size, tp=tp, ep=ep)
            reasons = [
                f"{name}={getattr(layout, name)} {reason}" for name, reason in misfits(cfg.model, layout)
            ]
            if reasons:
                refused[layout] = reasons[0]
            else:
                fitting.append(layout)
    return fitting, refused


def richest(layouts: Sequence[Layout]) -> Layout:
    """Return the layout with the most kinds of parallelism; among equals, the one with the largest groups."""

    def key(layout: Layout) -> tuple[int, int, int]:
        kinds = (layout.dp, layout.tp, layout.ep, layout.edp)
        return sum(size > 1 for size in kinds), layout.ep, layout.tp

    return max(layouts, key=key)


def list_variants(cfg: RunConfig, layouts: Sequence[Layout]) -> list[Variant]:
    """Return the variants to compare.

    These are every layout with both ZeRO stages, sequence parallelism if tensors are split, and on the
    richest layout accumulation, recomputation and extra chunks of rows. All are in fp32, where a fault stands
    out from rounding. A bf16 config also runs in bf16, where DeepSpeed uses other code.
    """
    base = [Variant(layout, stage) for layout in layouts for stage in (1, 2)]
    stage = cfg.parallel.zero_stage
    base += [Variant(layout, stage, sequence_parallel=True) for layout in layouts if layout.tp > 1]
    rich = Variant(richest(layouts), stage)
    rich = replace(rich, sequence_parallel=rich.layout.tp > 1 and cfg.parallel.sequence_parallel)
    splits = [replace(rich, n_microbatches=n) for n in (2, 4)]
    splits.append(replace(rich, n_microbatches=2, zero_stage=2 if stage == 1 else 1))
    splits += [replace(rich, recompute=recompute) for recompute in ("selective", "full")]
    splits.append(replace(rich, n_microbatches=2, recompute="full", sequence_parallel=rich.layout.tp > 1))
    if rich.layout.ep > 1:
        splits += [replace(rich, n_chunks=2), replace(rich, max_load=TIGHT)]
    half = []
    if cfg.train.precision == "bf16":
        plain = [v for v in base if not v.sequence_parallel]
        half = [replace(v, precision="bf16") for v in [*plain, splits[1], splits[2], splits[4]]]
    return [*base, *splits, *half]
