"""The progress of a run: what the training loop carries from step to step besides the engine's state."""

from dataclasses import asdict, dataclass, field

from turnout.data.skips import SkippedWindow, merged
from turnout.moe.load_balancing import RouterState
from turnout.training.checkpoint.manifest import TrainingState
from turnout.training.guard import GuardState


@dataclass
class Progress:
    """step: optimizer steps done. n_skipped: how many of them changed no weight."""

    router_state: RouterState
    step: int = 0
    tokens_seen: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0
    n_interventions: int = 0
    guard: GuardState = field(default_factory=GuardState.initial)
    skipped: tuple[SkippedWindow, ...] = ()

    @classmethod
    def restored(
        cls, router_state: RouterState, state: TrainingState, skipped: tuple[SkippedWindow, ...]
    ) -> "Progress":
        """Return the progress of a checkpoint.

        skipped: the run's own list of data left out, which may contain later windows than the checkpoint.
        """
        skipped = merged(state.skipped, skipped)
        return cls(
            router_state,
            step=state.step,
            tokens_seen=state.tokens_seen,
            n_skipped=state.n_skipped,
            n_skipped_in_a_row=state.n_skipped_in_a_row,
            n_interventions=max(state.n_interventions, len(skipped)),
            guard=GuardState(**state.guard),
            skipped=skipped,
        )

    def to_state(self, *, optimizer: dict[str, float], loss_scaler: dict[str, float]) -> TrainingState:
        """Return what a checkpoint stores of this, together with the engine's scalars."""
        return TrainingState(
            step=self.step,
            tokens_seen=self.tokens_seen,
            n_skipped=self.n_skipped,
            n_skipped_in_a_row=self.n_skipped_in_a_row,
            n_interventions=self.n_interventions,
            optimizer=optimizer,
            loss_scaler=loss_scaler,
            guard=asdict(self.guard),
            skipped=self.skipped,
        )
