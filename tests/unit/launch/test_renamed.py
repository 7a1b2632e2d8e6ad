"""An old name that a person types is refused in one line that gives the new one, with exit code 2."""

from pathlib import Path

import pytest

from turnout.launch.cli.main import main
from turnout.launch.settings import load_config, to_toml

TYPED = {
    "a command": (["routes", "x"], "`turnout routes` is called `turnout experts` now"),
    "a command alone": (["routes"], "`turnout routes` is called `turnout experts` now"),
    "a setting": (
        ["train", "tiny", "--run-dir", "new", "--set", "parallel.ep_trips=2"],
        "--set parallel.ep_trips: no such setting; it is now called parallel.ep_chunks",
    ),
    "a setting for a dry run": (
        ["train", "tiny", "--dry-run", "--set", "checkpoint.is_async=false"],
        "--set checkpoint.is_async: no such setting; it is now called checkpoint.async_save",
    ),
    "a setting that may change": (
        ["train", "tiny", "--run-dir", "run", "--resume", "--allow-change", "checkpoint.is_async"],
        "--allow-change checkpoint.is_async: no such setting; it is now called checkpoint.async_save",
    ),
}


@pytest.mark.parametrize(("words", "message"), TYPED.values(), ids=TYPED.keys())
def test_an_old_name_is_refused_with_the_new_one(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(words)
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out, printed.err) == (2, "", f"turnout: {message}\n")
    assert not [*tmp_path.iterdir()], "nothing is written"


def test_an_old_setting_in_a_recipe_of_a_person_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = to_toml(load_config("tiny")).replace("async_save", "is_async")
    (recipe := tmp_path / "own.toml").write_text(own)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe), "--run-dir", str(tmp_path / "new")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint.is_async: no such setting; it is now called checkpoint.async_save" in line
