"""`turnout checkpoint` on real checkpoints: what it prints, what it removes, and its exit codes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import SMALL_SHAPE, save_alone, small_values
from turnout.launch.cli.main import main
from turnout.training.checkpoint.directory import (
    CHECKPOINTS,
    checkpoint_path,
    list_checkpoints,
    list_old,
    prune,
    set_aside,
    step_of,
    unfinished_path,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import MANIFEST, rank_file

STEPS = (10, 20, 30, 40)
ESCAPE = "\x1b[2J"
Turnout = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    save_alone(
        run_dir, STEPS, n_skipped=2, skipped=[{"first": 5, "last": 7, "reason": f"a spike{ESCAPE}"}],
        loss_scaler={"cur_scale": 65536.0},
    )  # fmt: skip
    return run_dir


@pytest.fixture
def run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, with steps 10 to 40, in the working directory; its path is relative."""
    shutil.copytree(saved, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.fixture
def turnout(capsys: pytest.CaptureFixture[str]) -> Turnout:
    """Run `turnout checkpoint`; return its exit code, the lines of stdout, and stderr."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        with pytest.raises(SystemExit) as caught:
            main(["checkpoint", *map(str, arguments)])
        said = capsys.readouterr()
        assert ESCAPE not in said.out + said.err
        return int(caught.value.code or 0), said.out.splitlines(), said.err

    return call


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def steps_in(run: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run)]


def test_list_shows_every_state_newest_first(run: Path, turnout: Turnout) -> None:
    set_aside(checkpoint_path(run, 10), Disk())
    (checkpoint_path(run, 20) / rank_file(0)).unlink()
    flip(checkpoint_path(run, 30) / rank_file(0))  # list does not read it
    unfinished_path(run, 50, "ab12").mkdir()
    (unfinished_path(run, 50, "ab12") / rank_file(0)).write_bytes(bytes(3 << 20))
    code, lines, _ = turnout("list", run)
    assert code == 0
    head, *rows, note = [re.split(r"  +", line) for line in lines]
    assert head == ["step", "size", "saved layout", "tokens seen", "written", "state"]
    assert [row[0] for row in rows] == ["50", "40", "30", "20", "10"]
    assert [row[-1] for row in rows] == [
        "unfinished",
        "readable",
        "readable",
        f"damaged: {checkpoint_path(run, 20) / rank_file(0)}: is missing",
        "set aside as damaged",
    ]
    assert rows[0][1] == "3.00 MiB"
    assert rows[1][2:4] == ["world=1 tp=1 ep=1 zero=1", "3,840"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", rows[1][4])
    assert note == ["tensors were not read; to read every byte: turnout checkpoint verify run"]


def test_verify_reads_one_or_all(run: Path, turnout: Turnout) -> None:
    code, lines, err = turnout("verify", checkpoint_path(run, 30))
    assert (code, err) == (0, "")
    intact = rf"{checkpoint_path(run, 30)}: intact, 0\.00 MiB in 3 files, [\d,]+ MB/s"
    assert [re.fullmatch(intact, line) is not None for line in lines] == [True]
    code, lines, _ = turnout("verify", run)
    assert code == 0
    assert [line.partition(":")[0] for line in lines] == [str(checkpoint_path(run, s)) for s in STEPS[::-1]]


def test_verify_names_the_damaged_file(run: Path, turnout: Turnout) -> None:
    damaged = checkpoint_path(run, 40) / rank_file(0)
    flip(damaged)
    code, lines, err = turnout("verify", checkpoint_path(run, 40))
    assert (code, lines) == (4, [])
    assert re.fullmatch(rf"turnout: {damaged}: SHA-256 \S+, but .*; put a good copy there\n", err)
    code, lines, err = turnout("verify", run)
    assert (code, len(lines)) == (4, 3), "the others are verified, too"
    assert err.startswith(f"turnout: 1 of 4 checkpoints are damaged: {damaged}: SHA-256 ")
    assert err.endswith(f"; the newest intact one is {checkpoint_path(run, 30)}\n")
    code, _, err = turnout("verify", checkpoint_path(run, 41))
    assert code == 4 and "step-00000041: no such checkpoint" in err


def test_show_prints_the_contents(run: Path, turnout: Turnout) -> None:
    code, lines, _ = turnout("show", checkpoint_path(run, 20))
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines if "  " in line.strip())
    assert code == 0
    assert rows["step"] == "20" and rows["tokens seen"] == "1,920"
    assert rows["saved layout"] == "world=1 tp=1 ep=1 zero=1 (it loads at any layout)"
    assert (rows["corpus"], rows["tokenizer"]) == ("c", "t")
    assert rows["config"] == str(checkpoint_path(run, 20) / "config.toml")
    assert rows["parameters"] == "24 in 1 tensors" and rows["per parameter"] == "master, exp_avg"
    assert (rows["optimizer"], rows["loss scale"]) == ("step=7", "cur_scale=65536")
    assert rows["updates skipped"] == "2, 0 of them in a row until this step"
    assert rows["guard"].startswith("n_losses=0, ")
    assert rows["data skipped"] == r"data steps 5 to 7: a spike\x1b[2J"
    assert lines[-1] == "  w  6 x 4"
    _, lines, _ = turnout("show", run)
    assert lines[0].split() == ["checkpoint", str(checkpoint_path(run, 40))]


def test_show_computes_statistics_of_the_weights(run: Path, turnout: Turnout) -> None:
    _, lines, _ = turnout("show", checkpoint_path(run, 20), "--tensors")
    weights = small_values(20, "master").double()
    assert weights.numel() == SMALL_SHAPE[0] * SMALL_SHAPE[1]
    shown = [float(number) for number in lines[-1].split()[5::2]]
    want = [weights.mean(), weights.std(correction=0), weights.min(), weights.max()]
    assert shown == pytest.approx([float(x) for x in want], rel=1e-3)


def test_prune_keeps_the_newest_and_the_multiples(run: Path, turnout: Turnout) -> None:
    n_bytes = sum(f.stat().st_size for s in (10, 30) for f in checkpoint_path(run, s).iterdir())
    dry = turnout("prune", run, "--keep-last", 1, "--keep-every-steps", 20, "--dry-run")
    assert dry[0] == 0 and steps_in(run) == [40, 30, 20, 10]
    assert dry[1][-1] == f"{n_bytes / 2**20:.2f} MiB would be freed, 2 of 4 checkpoints kept"
    code, lines, _ = turnout("prune", run, "--keep-last", 1, "--keep-every-steps", 20)
    assert code == 0 and steps_in(run) == [40, 20]
    assert [line.partition(":")[0] for line in lines[1:-1]] == [
        str(checkpoint_path(run, s)) for s in (30, 10)
    ]
    assert lines[-1] == f"{n_bytes / 2**20:.2f} MiB freed, 2 of 4 checkpoints kept"
    assert {path.name for path in (run / CHECKPOINTS).iterdir()} == {
        "step-00000040", "step-00000020", "latest",
    }  # fmt: skip
    assert turnout("prune", run, "--keep-last", 2)[1] == [
        "nothing to remove: all 2 checkpoints of run are kept"
    ]


def flip_a_weight(path: Path) -> None:
    flip(path / rank_file(0))


def delete_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [flip_a_weight, delete_manifest])
def test_prune_never_removes_the_newest_intact_one(
    damage: Callable[[Path], None], run: Path, turnout: Turnout
) -> None:
    for step in (30, 40):
        damage(checkpoint_path(run, step))
    code, lines, _ = turnout("prune", run, "--keep-last", 2)
    assert code == 0 and steps_in(run) == [40, 30, 20]
    assert f"{checkpoint_path(run, 20)}: kept, because it is the newest intact checkpoint" in lines
    damage(checkpoint_path(run, 20))
    code, _, err = turnout("prune", run, "--keep-last", 2)
    assert code == 4 and "nothing was removed" in err and steps_in(run) == [40, 30, 20]


def test_a_run_without_checkpoint(tmp_path: Path, turnout: Turnout) -> None:
    (tmp_path / "run" / CHECKPOINTS).mkdir(parents=True)
    run = tmp_path / "run"
    for command in (["list", run], ["prune", run, "--keep-last", 1]):
        assert turnout(*command) == (0, [f"{run} has no checkpoint yet"], "")
    for command, purpose in (("verify", "verify"), ("show", "show")):
        code, _, err = turnout(command, run)
        assert (code, err) == (4, f"turnout: {run} has no checkpoint yet, so there is nothing to {purpose}\n")


class RacingDisk(Disk):
    """The run removes step 20 just before the command renames it."""

    def boundary(self, name: str, path: Path) -> None:
        if name == "rename" and path.name.startswith("step-00000020."):
            shutil.rmtree(checkpoint_path(path.parents[1], 20))


def test_prune_continues_if_the_run_removed_one_first(run: Path) -> None:
    removed = prune(list_old(run, keep_last=1, keep_every_steps=None), RacingDisk())
    assert [step_of(path) for path in removed] == [30, 10]
    assert steps_in(run) == [40]
