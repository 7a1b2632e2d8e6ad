"""A run directory with a checkpoint of a whole model, written without training."""

from pathlib import Path

from tests.checkpoints import saver_of, state_at
from tests.ranks import join_alone
from turnout.launch.settings import to_toml
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.moe.parallel.sharding import split_of
from turnout.training.checkpoint.directory import checkpoint_path
from turnout.training.checkpoint.manifest import BIAS, LOAD_FRAC, Attached, DataIdentity
from turnout.training.checkpoint.rank_state import Placement, RankState
from turnout.training.checkpoint.resharding import Matrix, Shard
from turnout.training.checkpoint.tensor_files import key_of
from turnout.training.config.optim import MASTER
from turnout.training.config.run import RunConfig
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import take_over


def save_model(
    run_dir: Path, cfg: RunConfig, decoder: Decoder, state: RouterState, tokenizer: Path, *, step: int = 10
) -> Path:
    """Save fp32 weights as a run's checkpoint of one rank, without optimizer state; return its path."""
    join_alone()
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.toml").write_text(to_toml(cfg))
    groups = Groups(Layout(1), 0, decoder.embed.weight.device, timeout_s=30)
    attached = Attached(
        DataIdentity(corpus_hash="c", tokenizer_sha256="t"),
        {"config.toml": to_toml(cfg).encode(), f"tokenizer{tokenizer.suffix}": tokenizer.read_bytes()},
    )
    saver = saver_of(run_dir, groups, cfg, token=take_over(run_dir), attached=attached)
    saver.save(_rank_state_of(decoder, state), state_at(step, optimizer={}))
    saver.close()
    groups.close()
    return checkpoint_path(run_dir, step)


def _rank_state_of(decoder: Decoder, state: RouterState) -> RankState:
    placements, tensors = {}, {}
    for name, parameter in decoder.named_parameters():
        shape = tuple(parameter.shape)
        matrix = Matrix.of(shape, split_of(name))
        placements[name] = Placement(shape, matrix, Shard(0, matrix.row_width, 0, parameter.numel()))
        tensors[key_of(MASTER, name)] = parameter.detach().flatten()
    return RankState((MASTER,), placements, tensors, {BIAS: state.bias_ME, LOAD_FRAC: state.load_frac_ME})
