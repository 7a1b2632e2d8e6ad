"""What `turnout submit` has bash read: its batch script, with any path in it, and the site's env file."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.launch.slurm.test_batch_script import NASTY, PLAIN
from tests.unit.launch.slurm.test_submit import CPUS, NODES, make_place, refused
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.attempt_records import begin_here, write_begin
from turnout.launch.slurm.batch_script import job_name, job_script
from turnout.training.run_control import Status, write_status


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_place(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["half.env", "latin.env"])
def test_an_env_file_that_bash_cannot_read_is_refused(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = ["submit", "run.toml", "--run-dir", "run", *NODES, *CPUS]
    code, said = refused(*submit, "--env-file", name, capsys=capsys)
    assert code == 2 and f"--env-file {name}: bash cannot read it" in said
    assert not (place / "run").exists()


@pytest.mark.parametrize("nasty", NASTY)
def test_a_path_is_one_word_to_bash_whatever_it_contains(nasty: str, tmp_path: Path) -> None:
    run_dir = tmp_path / nasty
    request = replace(PLAIN, run_dir=run_dir, submission=run_dir / "submission", python=run_dir / "python")
    lines = job_script(request).partition("# The lines above")[0]
    printed = subprocess.run(
        ["bash", "-euc", f'{lines}\nprintf "%s\\0" "$run_dir" "$submission" "$python"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split("\0")[:3] == [
        str(run_dir),
        str(run_dir / "submission"),
        str(run_dir / "python"),
    ]
    assert not any(tmp_path.iterdir()), "nothing was run"
    directives = [line for line in lines.splitlines() if line.startswith("#SBATCH")]
    assert len(directives) == len(job_script(PLAIN).split("#SBATCH")) - 1
    assert all(char.isalnum() or char in "_.-" for char in job_name(run_dir))


def test_a_machine_without_slurm_is_reported_as_such(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused("submit", "run.toml", "--run-dir", "run", *NODES, *CPUS, capsys=capsys)
    assert code == 2 and "sbatch is not installed here" in said
    assert not (place / "run").exists()
    code, said = refused("status", capsys=capsys)
    assert code == 1 and "squeue is not installed here" in said


def test_a_warning_that_comes_too_late_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The attempts at the run have measured 100 s and 300 s: 1.5 * (100 + 2 * 300) + 15 = 1065 s."""
    attempt_dir = make_attempt_dir(place / "run" / "logs")
    write_begin(attempt_dir, begin_here(1, 0, ["n1"]))
    write_status(attempt_dir, Status("training", 10, longest_gap_s=100.0, longest_save_s=300.0))
    submit = ["submit", "run.toml", "--run-dir", "run", *NODES, *CPUS, "--warn-s"]
    code, said = refused(*submit, "1064", capsys=capsys)
    assert code == 2 and "--warn-s 1064 is below the 1065 s" in said and "use at least 1065" in said
    _, said = refused(*submit, "1065", capsys=capsys)
    assert "sbatch is not installed here" in said, "the next check"
