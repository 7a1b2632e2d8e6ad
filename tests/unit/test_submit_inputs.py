"""What `turnout submit` and `turnout status` refuse by themselves: one line, a code, nothing written."""

import shutil
from pathlib import Path

import pytest

from launch.cli import main
from launch.start_dir import make_start_dir
from launch.starts import begin_here, write_begin
from tests.unit.data_fixtures import make_corpus, make_texts
from tests.unit.test_bad_inputs import MODEL
from training.status import Status, write_status

NODES, CPUS = ["--nodes", "1"], ["--ranks-per-node", "1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good recipe and a good corpus, on a machine without SLURM."""
    make_corpus(tmp_path, {"text": make_texts(60)}, valid_frac=0.2)
    (tmp_path / "run.toml").write_text(MODEL)
    (tmp_path / "taken").touch()
    (tmp_path / "half.env").write_text("if true; then\n")
    (tmp_path / "latin.env").write_bytes(b"# caf\xe9\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bash").symlink_to(str(shutil.which("bash")))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("turnout: "), said
    assert isinstance(end.value.code, int)
    return end.value.code, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (NODES, "name either --gpus-per-node N, one rank for each, or --ranks-per-node N"),
        ([*NODES, *CPUS, "--gpus-per-node", "1"], "name either --gpus-per-node N"),
        ([*NODES, "--ranks-per-node", "0"], "--ranks-per-node 0 must be at least 1"),
        ([*NODES, *CPUS, "--chain", "0"], "--chain 0 must be at least 1"),
        ([*NODES, *CPUS, "--max-failures", "0"], "--max-failures 0 must be at least 1"),
        ([*NODES, *CPUS, "--chain", "2", "--preflight"], "--chain has no effect with --preflight"),
        ([*NODES, *CPUS, "--env-file", "absent.env"], "--env-file absent.env: there is no such file"),
        ([*NODES, *CPUS, "--env-file", "half.env"], "--env-file half.env: bash cannot read it"),
        ([*NODES, *CPUS, "--env-file", "latin.env"], "--env-file latin.env: bash cannot read it"),
        ([*NODES, *CPUS, "--time", "4"], "--warn-s 300 must be above 0 and below the 240 s of --time 4"),
        (["--nodes", "two", *CPUS], "--nodes 'two' is neither a number nor MIN-MAX"),
        ([*NODES, *CPUS, "--sbatch", "signal=B:USR2@5"], "turnout sets signal itself; use --warn-s"),
        ([*NODES, *CPUS, "--sbatch", "mem=1", "--sbatch", "mem=2"], "--sbatch names mem twice"),
        ([*NODES, *CPUS, "--srun", "a b=c"], "is not a long option's name"),
        ([*NODES, *CPUS, "--srun", "ntasks=4"], "--srun ntasks: turnout sets ntasks itself"),
        (
            ["--nodes", "3", *CPUS],
            "--nodes 3: the batch and the layout fit on 2 nodes, the others would idle",
        ),
        (["--nodes", "3", *CPUS, "--set", "parallel.ep=4"], "parallel.ep=4 must divide world_size=3"),
        ([*NODES, *CPUS, "--allow-change", "optim.rate"], "--allow-change optim.rate: no such setting"),
    ],
)
def test_submit_refuses(
    arguments: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused("submit", "run.toml", "--run-dir", "run", *arguments, capsys=capsys)
    assert code == 2 and words in said, said
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("taken", "--run-dir taken is a file"),
        ("new\nline", "SLURM cannot run a job in a path with"),
        ("100%", "SLURM cannot run a job in a path with '%'"),
    ],
)
def test_submit_refuses_a_run_dir(
    name: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused("submit", "run.toml", "--run-dir", name, *NODES, *CPUS, capsys=capsys)
    assert code == 2 and words in said, said
    assert not (place / name).is_dir()


def test_a_machine_without_slurm_is_told_as_such(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused("submit", "run.toml", "--run-dir", "run", *NODES, *CPUS, capsys=capsys)
    assert code == 2 and "sbatch is not installed here" in said
    assert not (place / "run").exists()
    code, said = refused("status", capsys=capsys)
    assert code == 1 and "squeue is not installed here" in said


def test_a_warning_that_comes_too_late_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what the starts of the run have measured: 1.5 times 100 s and twice 300 s, and 15 s."""
    start = make_start_dir(place / "run" / "logs")
    write_begin(start, begin_here(1, 0, ["n1"]))
    write_status(start, Status("training", 10, longest_gap_s=100.0, longest_save_s=300.0))
    submit = ["submit", "run.toml", "--run-dir", "run", *NODES, *CPUS, "--warn-s"]
    code, said = refused(*submit, "1064", capsys=capsys)
    assert code == 2 and "--warn-s 1064 is below the 1065 s" in said and "use at least 1065" in said
    _, said = refused(*submit, "1065", capsys=capsys)
    assert "sbatch is not installed here" in said, "the next thing that is looked at"


def test_status_of_what_is_no_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("status", "absent", capsys=capsys)[0] == 2
    code, said = refused("status", "corpus", capsys=capsys)
    assert code == 2 and "holds something, but no run" in said
