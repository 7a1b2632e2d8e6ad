# `make demo` and `make test` set up everything they need. PYTHON names another interpreter, 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo test lint bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "turnout needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
# torch first: DeepSpeed's set-up looks for it.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: setup
	$(BIN)/turnout prepare --embedded --vocab-size 4096 --out corpora/stdlib
	$(BIN)/turnout train tiny --run-dir $(RUN_DIR) --nproc 2

test: setup
	$(BIN)/pytest tests --ignore tests/slurm
# Jobs are mostly waited for, so two tests run at once, each on a cluster of its own.
	$(BIN)/pytest tests/slurm --numprocesses 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build *.egg-info
