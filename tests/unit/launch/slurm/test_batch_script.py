"""The batch script: golden texts, and no option breaks out of it. tests/processes has bash read it."""

from dataclasses import replace
from pathlib import Path

import pytest

from turnout.launch.slurm.batch_script import JobRequest, job_script, parse_options, time_limit_s
from turnout.training.errors import ConfigError

GOLDEN = Path(__file__).parents[3] / "golden" / "jobs"
PLAIN = JobRequest(
    run_dir=Path("/runs/small"),
    submission=Path("/runs/small/slurm/submit-00001"),
    python=Path("/venv/bin/python"),
    nodes="8",
    time="24:00:00",
    warn_s=300,
    gpus_per_node=8,
)
REQUESTS = {
    "gpus": PLAIN,
    "shared-cpus": replace(PLAIN, nodes="1-2", gpus_per_node=None, is_shared=True),
    "chained": replace(PLAIN, is_requeued=False, options={"partition": "gpu", "mem-per-cpu": "4G"}),
}
NASTY = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch hacked)",
    "`touch hacked`",
    "new\nline",
    "-rf",
    "a;b&c|d",
    "%j",
    "\\",
]


@pytest.mark.parametrize("name", REQUESTS)
def test_script_is_the_golden_one(name: str) -> None:
    """After an intended change, `python -m tests.unit.launch.slurm.test_batch_script` writes them again."""
    assert job_script(REQUESTS[name]) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("nasty", [n for n in NASTY if n != "-rf"])  # after the = it is a plain value
def test_a_slurm_option_with_a_character_that_needs_quotes_is_refused(nasty: str) -> None:
    with pytest.raises(ConfigError, match="a character that a batch script cannot hold"):
        parse_options("--sbatch", [f"partition={nasty}"])
    with pytest.raises(ConfigError, match="is not a long option's name"):
        parse_options("--sbatch", [f"{nasty}=1"])


@pytest.mark.parametrize("name", ["nodes", "time", "signal", "output", "no-requeue", "array", "wrap"])
def test_options_that_turnout_sets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"turnout sets {name} itself"):
        job_script(replace(PLAIN, options={name: "1"}))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 600),
        ("10:30", 630),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-02:30:15", 95415),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": "0"}, "--nodes '0' is neither"),
        ({"nodes": "4-2"}, "--nodes '4-2' is neither"),
        ({"time": "soon"}, "--time 'soon' is no time"),
        ({"time": "1\n#SBATCH --uid=0"}, "is no time"),
        ({"time": "4"}, "--warn-s 300 must be above 0 and below the 240 s of --time 4"),
    ],
)
def test_a_bad_request_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job_script(replace(PLAIN, **change))  # type: ignore[arg-type]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, request in REQUESTS.items():
        (GOLDEN / f"{name}.sh").write_text(job_script(request))
