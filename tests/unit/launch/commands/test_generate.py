"""`turnout generate` on a real checkpoint: what it prints, where it reads, and its exit codes."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models import random_state, tiny_decoder
from tests.runs import run_config
from tests.saved_models import save_model
from tests.unit.data_fixtures import write_tokenizer
from turnout.data.tokenizer import load_tokenizer
from turnout.launch.cli.main import main
from turnout.launch.commands.generate import _printed
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.checkpoint.directory import checkpoint_path
from turnout.training.checkpoint.manifest import rank_file
from turnout.training.config.run import RunConfig
from turnout.training.config.sample import SampleConfig
from turnout.training.generation.generate import TextPiece, continue_prompts

CFG = run_config(
    model={"n_layers": 3, "vocab_size": 300, "seq_len": 40, "n_shared_experts": 1},
    train={"batch_tokens": 320},
)
Turnout = Callable[..., tuple[int, str, str]]


def build(cfg: RunConfig = CFG) -> tuple[Decoder, RouterState]:
    return tiny_decoder(cfg.model, dtype=torch.float32), random_state(cfg.model, bias=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(tmp_path_factory.mktemp("saved"))
    tokenizer = write_tokenizer(directory)
    save_model(directory / "run", CFG, *build(), tokenizer, step=10)
    other = tiny_decoder(CFG.model, dtype=torch.float32, seed=5)
    save_model(directory / "run", CFG, other, build()[1], tokenizer, step=20)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(saved / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.fixture
def turnout(capsys: pytest.CaptureFixture[str]) -> Turnout:
    """Run `turnout generate`; return its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["generate", *map(str, arguments)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(caught.value.code or 0), said.out, said.err

    return call


def greedy(saved: Path, *prompts: str, n_tokens: int = 12) -> list[str]:
    """Return the greedy text of whole passes of the model of step 10, as it was before it was saved."""
    sampled = SampleConfig(prompts=prompts, n_tokens=n_tokens, temperature=0)
    decoder, state = build()
    texts = continue_prompts(decoder, load_tokenizer(saved / "given.model"), state, sampled, seed=0)
    return [text.rstrip("\ufffd") for text in texts]


GREEDY = ("--temperature", 0, "--max-tokens", 12)


def test_one_prompt_from_one_checkpoint(saved: Path, run: Path, turnout: Turnout) -> None:
    path = checkpoint_path(run, 10)
    code, out, err = turnout(path, "the train", *GREEDY)
    assert (code, out) == (0, greedy(saved, "the train")[0] + "\n")
    lines = err.splitlines()
    assert lines[0].startswith(f"{path}: intact, ")
    assert lines[1].startswith(f"{path}: ") and "parameters in float32 on " in lines[1]
    assert lines[2].startswith("12 tokens in ") and len(lines) == 3
    assert turnout(path, "the train", *GREEDY, "--no-stream")[1] == out
    assert out.count(out[4:7]) == 1
    assert turnout(path, "the train", *GREEDY, "--stop", out[4:7])[1] == out[:4] + "\n"
    assert turnout(path, "the train", *GREEDY, "--dtype", "bfloat16")[0] == 0


def test_a_run_stands_for_its_newest_intact_checkpoint(saved: Path, run: Path, turnout: Turnout) -> None:
    newest = turnout(run, "the train", *GREEDY)
    assert newest[0] == 0 and newest[1] == turnout(checkpoint_path(run, 20), "the train", *GREEDY)[1]
    assert newest[1] != greedy(saved, "the train")[0] + "\n"
    file = checkpoint_path(run, 20) / rank_file(0)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, out, err = turnout(run, "the train", *GREEDY)
    assert (code, out) == (0, greedy(saved, "the train")[0] + "\n")
    assert f"{file}: SHA-256" in err and f"{checkpoint_path(run, 10)}: intact" in err
    code, out, err = turnout(checkpoint_path(run, 20), "the train", *GREEDY)
    assert (code, out) == (4, "") and f"{file}: SHA-256" in err


def test_several_prompts_and_samples(saved: Path, run: Path, turnout: Turnout) -> None:
    path = checkpoint_path(run, 10)
    Path("asked.txt").write_text("each lever\n")
    code, out, _ = turnout(path, "the train", "", "--prompt-file", "asked.txt", *GREEDY)
    texts = greedy(saved, "the train", "", "each lever")
    want = [f"--- prompt {i} of 3 ---\n{text}\n" for i, text in enumerate(texts, start=1)]
    assert (code, out) == (0, "".join(want))
    drawn = ("a", "--n-samples", 3, "--temperature", 1.5, "--max-tokens", 9, "--top-k", 50, "--min-p", 0.01)
    code, out, _ = turnout(path, *drawn, "--seed", 7)
    parts = out.split("--- prompt 1 of 1, sample ")
    assert [part[:11] for part in parts] == ["", "1 of 3 ---\n", "2 of 3 ---\n", "3 of 3 ---\n"]
    assert len({part[11:] for part in parts[1:]}) == 3
    assert turnout(path, *drawn, "--seed", 7)[1] == out != turnout(path, *drawn, "--seed", 17)[1]


def test_the_prompt_comes_from_stdin(
    saved: Path, run: Path, turnout: Turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the\ntrain\n")))
    code, out, _ = turnout(checkpoint_path(run, 10), *GREEDY)
    assert (code, out) == (0, greedy(saved, "the\ntrain")[0] + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff")))
    code, out, err = turnout(run)
    assert (code, err) == (2, "turnout: stdin: byte 4 is not UTF-8; give text in UTF-8\n")


def test_a_text_cut_at_seq_len_is_reported(run: Path, turnout: Turnout) -> None:
    code, _, err = turnout(run, "the train", "--temperature", 0, "--max-tokens", 500)
    assert code == 0
    assert "1 of 1 texts were cut at 40 tokens, prompt included: the model was trained on this seq_len" in err


def test_weights_on_disk_give_the_same_text(saved: Path, run: Path, turnout: Turnout) -> None:
    path = checkpoint_path(run, 10)
    want = greedy(saved, "the train")[0] + "\n"
    code, out, err = turnout(path, "the train", *GREEDY, "--max-memory", "60KiB")
    assert (code, out) == (0, want) and "3 on disk" in err
    assert not any(Path(word.rstrip(",")).exists() for word in err.split() if "turnout-" in word)
    code, out, err = turnout(path, "the train", *GREEDY, "--device-map", "auto")
    assert (code, out) == (0, want) and "blocks: 3 on " in err and "disk" not in err
    code, out, err = turnout(path, "the train", *GREEDY, "--max-memory", "20KiB")
    assert (code, out) == (2, "") and "must be there at once" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", 0], "--max-tokens 0 must be at least 1"),
        (["--n-samples", 0], "--n-samples 0 must be at least 1"),
        (["--top-k", 0], "--top-k 0 must be at least 1"),
        (["--top-p", 0], "--top-p 0 must be above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p nan must be above 0 and at most 1"),
        (["--min-p", 1.5], "--min-p 1.5 must be 0 to 1"),
        (["--seed", -1], "--seed -1 must be 0 to 4611686018427387903"),
        (["--temperature", -1], "--temperature -1 must be 0 (the most likely token), or 0.01 to 100"),
        (["--temperature", "inf"], "--temperature inf must be 0 (the most likely token), or 0.01 to 100"),
        (["--temperature", 0, "--top-k", 5], "--top-k 5 has no effect with --temperature 0"),
        (["--temperature", 0, "--n-samples", 2], "--n-samples 2 has no effect with --temperature 0"),
        (["--stop", ""], "--stop '' would end every text before it begins"),
        (["--max-memory", "much"], "--max-memory much is not a size; write it like 20GiB or 500MiB"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: No such file or directory"),
        (["switch " * 100], "prompt 2 has"),
    ],
)
def test_user_errors_are_one_line(arguments: list[object], words: str, run: Path, turnout: Turnout) -> None:
    code, out, err = turnout(run, "a", *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"turnout: {words}"), err


def test_a_path_without_a_model(tmp_path: Path, run: Path, turnout: Turnout) -> None:
    assert turnout("nowhere", "a")[0] == 2
    assert turnout(checkpoint_path(run, 30), "a")[::2] == (
        4, f"turnout: {checkpoint_path(run, 30)}: no such checkpoint\n",
    )  # fmt: skip
    for step in (10, 20):
        (checkpoint_path(run, step) / rank_file(0)).unlink()
    code, _, err = turnout(run, "a")
    assert code == 4 and "no intact checkpoint" in err.splitlines()[-1]
    shutil.rmtree(run / "checkpoints")
    code, _, err = turnout(run, "a")
    assert (code, err) == (4, "turnout: run has no checkpoint yet, so there are no weights to read\n")


class Terminal(io.StringIO):
    """A terminal that records each write."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_text_is_streamed_to_a_terminal(saved: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for options in ((), ("--no-stream",)):
        del terminal.pieces[:]
        with pytest.raises(SystemExit):
            main(["generate", str(checkpoint_path(run, 10)), "the train", *map(str, GREEDY), *options])
        text = greedy(saved, "the train")[0] + "\n"
        shown = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
        at = next(i for i in range(len(terminal.pieces)) if "".join(terminal.pieces[i:]) == shown)
        n_pieces = sum(piece != "" for piece in terminal.pieces[at:])
        assert n_pieces == 1 if options else n_pieces > 6


def test_a_model_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    list(_printed([TextPiece(0, "\ta\x1b[2Jb\u202e\n", "max tokens")], 1, 1, is_streamed=True))
    assert terminal.getvalue() == "\ta\\x1b[2Jb\\u202e\n\n"


def test_texts_are_printed_in_order_whichever_ends_first(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [TextPiece(0, "a", None), TextPiece(1, "b", "end of text"), TextPiece(2, "c", "stop string")]
    printing = _printed([*pieces, TextPiece(0, "A", "max tokens")], 3, 1, is_streamed=True)
    assert [next(printing) for _ in pieces] == pieces and not capsys.readouterr().out
    list(printing)
    title = "--- prompt {} of 3 ---\n".format
    assert capsys.readouterr().out == f"{title(1)}aA\n{title(2)}b\n{title(3)}c\n"
