"""How a31d440/ was made: `python tests/old_run/make.py OUT`, with `turnout` on the path.

That `turnout` must be the one of the commit a31d440: a clone at this commit after `make setup`. OUT holds a
corpus, a run of two ranks that rolled back twice, its last two checkpoints, and an export. Every later
Turnout must read them, so they are never made again.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

RECIPE = """
[model]
n_layers = 2
d_model = 16
n_heads = 2
n_kv_heads = 2
d_head = 8
d_expert = 8
n_experts = 4
top_k = 2
vocab_size = 300
seq_len = 32
qk_norm = true

[model.balance]
coef = 0.01
scope = "batch"

[train]
n_steps = 12
batch_tokens = 256
microbatch_seqs = 2
clip_norm = 1.0

[optim]
lr = 0.3

[optim.schedule]
warmup_steps = 2

[parallel]
ep = 2
ep_trips = 2

[data]
corpus = "corpus"

[guard]
on_spike = "rollback"
spike_sigma = 1.0
spike_window_steps = 2
max_interventions = 3

[eval]
every_steps = 6
max_documents = 2

[sample]
prompts = ["the lever"]
n_tokens = 8

[log]
every_steps = 1

[checkpoint]
every_steps = 3
keep_last = 2
"""
SENTENCE = "the lever moves each switch so that a train of seven cars takes its own track at 0417"


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True)
    draw = random.Random(0)
    texts = [
        "".join(f"{word} " for word in draw.choices(SENTENCE.split(), k=draw.randint(5, 60)))
        for _ in range(60)
    ]
    (out / "run.toml").write_text(RECIPE)
    for i, text in enumerate(texts):
        (out / "texts").mkdir(exist_ok=True)
        (out / "texts" / f"{i:02}.txt").write_text(text)
    prepare = ["prepare", "texts", "--vocab-size", "300", "--valid-frac", "0.1", "--out", "corpus"]
    train = ["train", "run.toml", "--run-dir", "run", "--nproc", "2"]
    export = ["export", "--checkpoint", "run", "--out", "export", "--format", "hf"]
    for command in (prepare, train, export):
        subprocess.run(["turnout", *command], cwd=out, check=True)
    shutil.rmtree(out / "texts")
    shutil.rmtree(out / "run" / "tensorboard")


if __name__ == "__main__":
    main()
