"""The provenance of a run that an earlier release began."""

import json
import shutil
from pathlib import Path

from turnout.data.corpus import open_corpus
from turnout.launch.run_dir import data_identity, identity_of, read_config, resume_run_dir

OLD = Path(__file__).parents[2] / "old_run" / "a31d440"


def test_a_resumed_run_keeps_the_attempts_of_an_earlier_release(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(OLD / "run", tmp_path / "run"))
    corpus = open_corpus(OLD / "corpus", verify="size")
    (first,) = json.loads((run_dir / "provenance.json").read_text())["starts"]
    assert data_identity(run_dir) == identity_of(corpus)
    resume_run_dir(run_dir, read_config(run_dir), corpus, nproc=5)
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert provenance.keys() == {"attempts"}
    kept, added = provenance["attempts"]
    assert kept == first and added["nproc"] == 5
    assert data_identity(run_dir) == identity_of(corpus)
