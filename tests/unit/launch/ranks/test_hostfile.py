"""Hostfiles: what is read from them and what is refused. tests/slurm trains with one, over ssh."""

import sys
from pathlib import Path

import pytest

from tests.unit.data_fixtures import make_corpus, make_texts
from tests.unit.saved_fixtures import turnout
from turnout.launch.ranks.hostfile import Hosts, check_hosts, read_hosts
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
        check_hosts(hosts, tmp_path / name)


def test_a_missing_pdsh_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")  # the clone may lie in a path with a blank
    monkeypatch.setenv("PATH", "/nowhere")
    hosts = Hosts(tmp_path / "hosts", ("a", "b"), 1)
    with pytest.raises(ConfigError, match="--hostfile needs pdsh .* use turnout submit"):
        check_hosts(hosts, tmp_path)


def test_a_refused_start_on_hosts_leaves_no_run_directory(
    hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next command, with a better path, must not find a directory that is not empty."""
    monkeypatch.chdir(tmp_path)
    make_corpus(tmp_path / "corpora", {"text": make_texts(30)}, valid_frac=0.1)
    hostfile.write_text("n1 slots=1\n")
    settings = ["--set", f"data.corpus={tmp_path / 'corpora' / 'corpus'}", "--set", "model.vocab_size=128"]
    assert turnout("train", "tiny", "--run-dir", "a b", "--hostfile", hostfile, *settings) == 2
    assert "passes through the shells of other machines" in capsys.readouterr().err
    assert not (tmp_path / "a b").exists()
