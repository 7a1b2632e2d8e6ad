"""`python -m tests.check_demo RUN_DIR`: check that the demo learned Python and wrote its files."""

import sys
from pathlib import Path

from tests.runs import read_rows

MAX_BITS_PER_BYTE = 2.0


def main() -> None:
    run_dir = Path(sys.argv[1])
    rows = read_rows(run_dir)
    bits_per_byte = [row["eval/bits_per_byte"] for row in rows if "eval/bits_per_byte" in row]
    assert len(bits_per_byte) == 1, f"{len(bits_per_byte)} evaluations, but the demo makes one"
    assert bits_per_byte[0] < MAX_BITS_PER_BYTE, f"{bits_per_byte[0]:.4f} bits per byte on held-out text"
    for name in (
        "config.toml",
        "provenance.json",
        "tensorboard",
        "logs/rank-00000.log",
        "logs/rank-00001.log",
    ):
        assert (run_dir / name).exists(), f"{run_dir / name} is missing"
    print(f"demo: {bits_per_byte[0]:.4f} bits per byte on held-out text, below {MAX_BITS_PER_BYTE}")


if __name__ == "__main__":
    main()
