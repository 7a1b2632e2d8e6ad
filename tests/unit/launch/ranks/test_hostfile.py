"""Hostfiles: what is read from them and what is refused. tests/slurm trains with one, over ssh."""

from pathlib import Path

import pytest

from turnout.launch.ranks.hostfile import Hosts, read_hosts, runner_command
from turnout.training.errors import ConfigError


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    return tmp_path / "hosts"


def test_hosts_are_read_in_order_without_comments(hostfile: Path) -> None:
    hostfile.write_text("# two machines\n\nnode-2.site slots=8\nnode-1.site slots=8  # the slow one\n")
    assert read_hosts(hostfile) == Hosts(hostfile, ("node-2.site", "node-1.site"), 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("n1 slots=2\nn2\n", "line 2 'n2' is not NAME slots=N"),
        ("n1 slots=0\n", "line 1 'n1 slots=0' is not NAME slots=N"),
        ("n1;reboot slots=2\n", "is not NAME slots=N"),
        ("-oProxyCommand=reboot slots=2\n", "is not NAME slots=N"),
        ("n1 slots=2\nn1 slots=2\n", "line 2 'n1 slots=2' names a host twice"),
        ("n1 slots=2\nn2 slots=4\n", r"slots differ \(n1 2, n2 4\)"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(text: str, words: str, hostfile: Path) -> None:
    hostfile.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_hosts(hostfile)


def test_a_missing_hostfile_is_refused(hostfile: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hosts(hostfile)


@pytest.mark.parametrize("name", ["a b", "$(reboot)", "a;b", "it's"])
def test_a_path_that_a_shell_would_interpret_is_refused(name: str, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "hosts", ("n1", "n2"), 2)
    with pytest.raises(ConfigError, match="passes through the shells of other machines"):
        runner_command(tmp_path / name, tmp_path / name / "logs", hosts)


def test_a_missing_pdsh_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    hosts = Hosts(tmp_path / "hosts", ("a", "b"), 1)
    with pytest.raises(ConfigError, match="--hostfile needs pdsh, .* use turnout submit"):
        runner_command(tmp_path, tmp_path, hosts)
