"""A Turnout model in the lm-evaluation-harness: tasks, offline, compared with values computed here."""

import json
import math
import re
from typing import Any

import pytest
import torch

from tests.unit.data_fixtures import write_jsonl
from tests.unit.saved_fixtures import SavedRun, make_saved_run, turnout

ROLLING = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/mixed.jsonl}}, cache_dir: {place}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/questions.jsonl}}, cache_dir: {place}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
WRITING = """
task: own_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/questions.jsonl}}, cache_dir: {place}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "the"
generation_kwargs: {{max_gen_toks: {n_tokens}, until: {until}}}
metric_list: [{{metric: exact_match}}]
"""
# The third is longer, with its answers, than the model's 16 positions; the fourth is nothing but the answer.
QUESTIONS = [
    {"question": "the lever moves", "choices": ["each", "switch so", "takes"], "answer": 1},
    {"question": "def x():", "choices": ["return", "0417"], "answer": 0},
    {"question": "a train of seven cars takes its own track at 0417 so that", "choices": ["a", "each switch"],
     "answer": 1},
    {"question": "", "choices": ["the", "train of"], "answer": 0},
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    saved = make_saved_run(tmp_path_factory.mktemp("saved"))
    place = saved.place
    texts = [json.loads(line)["text"] for name in "ab" for line in (place / f"{name}.jsonl").open()]
    write_jsonl(place / "mixed.jsonl", texts)
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (place / "tasks").mkdir()
    (place / "tasks" / "text.yaml").write_text(ROLLING.format(place=place))
    (place / "tasks" / "choices.yaml").write_text(CHOICES.format(place=place))
    return saved


def run_task(saved: SavedRun, task: str, *more: object) -> dict[str, Any]:
    out = saved.place / f"{task}.json"
    where = ["--include-path", saved.place / "tasks", "--out", out]
    assert turnout("lm-eval", saved.run_dir, "--tasks", task, *where, *more) == 0
    return json.loads(out.read_text())


def test_bits_per_byte_equal_those_of_evaluate(saved: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_task(saved, "own_text")["results"]["own_text"]
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "bits_per_byte" in line)
    assert f" {results['bits_per_byte,none']:.4f} " in row and "own_text" in row
    out = saved.place / "scores.json"
    assert turnout("evaluate", saved.run_dir, saved.place / "mixed.jsonl", "--out", out) == 0
    want = json.loads(out.read_text())["total"]
    assert want["n_documents"] == 20
    assert results["bits_per_byte,none"] == pytest.approx(want["bits_per_byte"], abs=5e-5)
    few = run_task(saved, "own_text", "--limit", 3)["results"]["own_text"]["bits_per_byte,none"]
    assert turnout(
        "evaluate", saved.run_dir, saved.place / "mixed.jsonl", "--max-documents", 3, "--out", out
    ) == 0  # fmt: skip
    assert few == pytest.approx(json.loads(out.read_text())["total"]["bits_per_byte"], abs=5e-5)


@torch.no_grad()
def answer_by_hand(saved: SavedRun, question: str, choice: str) -> tuple[float, bool]:
    """Return the log-likelihood of " choice" after the question, and whether each token is the likeliest."""
    tokenizer, seq_len = saved.corpus.load_tokenizer(), saved.decoder.cfg.seq_len
    whole = [tokenizer.bos_id, *tokenizer.encode(f"{question} {choice}")]
    n_answer = len(whole) - 1 - len(tokenizer.encode(question))
    inputs, answer = whole[:-1][-seq_len:], whole[-n_answer:]
    tokens = torch.tensor(inputs + [0] * (seq_len - len(inputs)))[None]
    is_counted = (torch.arange(seq_len) < len(inputs))[None]
    hidden, _ = saved.decoder(tokens, torch.zeros_like(tokens), is_counted, saved.state)
    logprobs = saved.decoder.logits(hidden)[0, len(inputs) - n_answer : len(inputs)].double().log_softmax(-1)
    total = math.fsum(float(row[token]) for row, token in zip(logprobs, answer, strict=True))
    return total, logprobs.argmax(-1).tolist() == answer


def test_choices_are_scored_as_by_hand(saved: SavedRun) -> None:
    results = run_task(saved, "own_choices")
    samples = sorted(results["samples"]["own_choices"], key=lambda sample: sample["doc_id"])
    n_right = 0
    for sample, row in zip(samples, QUESTIONS, strict=True):
        want = [answer_by_hand(saved, row["question"], choice) for choice in row["choices"]]
        got = [response[0] for response in sample["resps"]]
        assert [float(nll) for nll, _ in got] == pytest.approx([nll for nll, _ in want], rel=1e-5)
        assert [str(is_greedy) for _, is_greedy in got] == [str(is_greedy) for _, is_greedy in want]
        best = max(range(len(want)), key=lambda i: want[i][0])
        n_right += best == row["answer"]
    assert results["results"]["own_choices"]["acc,none"] == pytest.approx(n_right / len(QUESTIONS))


@torch.no_grad()
def continue_by_hand(saved: SavedRun, question: str, n_tokens: int) -> str:
    tokenizer, seq_len = saved.corpus.load_tokenizer(), saved.decoder.cfg.seq_len
    ids = [tokenizer.bos_id, *tokenizer.encode(question)][-(seq_len - n_tokens) :]
    n_prompt = len(ids)
    for _ in range(n_tokens):
        tokens = torch.tensor(ids + [0] * (seq_len - len(ids)))[None]
        is_counted = (torch.arange(seq_len) < len(ids))[None]
        hidden, _ = saved.decoder(tokens, torch.zeros_like(tokens), is_counted, saved.state)
        ids.append(int(saved.decoder.logits(hidden)[0, len(ids) - 1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            ids.pop()
            break
    return tokenizer.decode(ids[n_prompt:])


def test_generation_stops_at_the_stop_string(saved: SavedRun) -> None:
    want = [continue_by_hand(saved, row["question"], 6) for row in QUESTIONS]
    stop = want[0][2]
    (saved.place / "tasks" / "writing.yaml").write_text(
        WRITING.format(place=saved.place, n_tokens=6, until=json.dumps([stop]))
    )
    samples = run_task(saved, "own_writing")["samples"]["own_writing"]
    got = [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    assert got == [text.split(stop)[0] for text in want]
    assert got[0] == want[0].split(stop)[0] != want[0]


def test_samples_of_one_prompt_differ(saved: SavedRun) -> None:
    """With top_k=1 they equal the greedy text."""
    writing = WRITING.format(place=saved.place, n_tokens=6, until="[]")
    drawn = "{do_sample: true, temperature: 3.0, max_new_tokens: 6, until: []}"
    for name, options in (("drawn", drawn), ("top", drawn.replace("until", "top_k: 1, until"))):
        text = re.sub("generation_kwargs: .*", f"generation_kwargs: {options}\nrepeats: 4", writing)
        (saved.place / "tasks" / f"{name}.yaml").write_text(text.replace("own_writing", name))
    answers = {}
    for name in ("drawn", "top"):
        samples = run_task(saved, name)["samples"][name]
        (answers[name],) = [sample["resps"][0] for sample in samples if sample["doc_id"] == 0]
    assert len({*answers["drawn"]}) == 4 and {*answers["top"]} == {
        continue_by_hand(saved, QUESTIONS[0]["question"], 6)
    }


def test_task_errors_are_reported(saved: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = saved.place / "tasks"
    (tasks / "lost.yaml").write_text(CHOICES.format(place="nowhere").replace("own_choices", "lost"))
    (tasks / "long.yaml").write_text(
        WRITING.format(place=saved.place, n_tokens=16, until="[]").replace("own_writing", "long")
    )
    (tasks / "beams.yaml").write_text(
        WRITING.format(place=saved.place, n_tokens="6, num_beams: 2", until="[]").replace(
            "own_writing", "beams"
        )
    )
    for words, code, message in [
        (["--tasks", "lost"], 3, "--tasks lost: cannot be loaded"),
        (["--tasks", "long"], 3, "max_gen_toks=16 must leave room for a prompt in the model's seq_len=16"),
        (["--tasks", "beams"], 3, "generation_kwargs ['num_beams'] are unknown; use only ['do_sample', "),
        (["--tasks", "own_choices", "--num-fewshot", 9], 3, "--tasks own_choices: ValueError: "),
        (["--tasks", ","], 2, "names no task"),
        (["--tasks", "lost", "--limit", 0], 2, "--limit 0 must be at least 1"),
        (["--tasks", "lost", "--include-path", "nowhere"], 2, "--include-path nowhere is not a directory"),
    ]:
        where = [] if "--include-path" in words else ["--include-path", tasks]
        assert turnout("lm-eval", saved.run_dir, *words, *where) == code
        assert message in (said := capsys.readouterr().err), said
