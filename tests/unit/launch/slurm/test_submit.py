"""What `turnout submit` and `turnout status` refuse without SLURM: one line, a code, nothing written."""

import shutil
from pathlib import Path

import pytest

from tests.unit.data_fixtures import make_corpus, make_texts
from tests.unit.launch.test_bad_inputs import MODEL
from turnout.launch.cli.main import main

NODES, CPUS = ["--nodes", "1"], ["--ranks-per-node", "1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_place(tmp_path, monkeypatch)


def make_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a working directory with a good recipe and a good corpus, on a machine without SLURM."""
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
        (NODES, "name either --gpus-per-node N, for one rank per GPU, or --ranks-per-node N"),
        ([*NODES, *CPUS, "--gpus-per-node", "1"], "name either --gpus-per-node N"),
        ([*NODES, "--ranks-per-node", "0"], "--ranks-per-node 0 must be at least 1"),
        ([*NODES, *CPUS, "--chain", "0"], "--chain 0 must be at least 1"),
        ([*NODES, *CPUS, "--max-failures", "0"], "--max-failures 0 must be at least 1"),
        ([*NODES, *CPUS, "--chain", "2", "--preflight"], "--chain has no effect with --preflight"),
        ([*NODES, *CPUS, "--env-file", "absent.env"], "--env-file absent.env: there is no such file"),
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


def test_status_refuses_a_directory_without_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("status", "absent", capsys=capsys)[0] == 2
    code, said = refused("status", "corpus", capsys=capsys)
    assert code == 2 and "is not empty, but holds no run" in said
