# `make demo` and `make test` set up everything they need. PYTHON selects another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAIN := build/plain
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo quick test test-all mutants test-megablocks test-transformers4 test-llamacpp megablocks lint bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "turnout needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
# torch first: DeepSpeed's setup script looks for it.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: setup
	$(BIN)/turnout prepare --embedded --vocab-size 4096 --out corpora/stdlib
	$(BIN)/turnout train tiny --run-dir $(RUN_DIR) --nproc 2

# The test tiers. Each runs all of its parts and prints one summary (tests/tiers.py).
quick: setup
	$(BIN)/python -m tests.tiers quick

test: setup
	$(BIN)/python -m tests.tiers test

# The tests that `make test` leaves out.
test-all: setup
	$(BIN)/python -m tests.tiers rest

# Breaks the code in one place after another; each time the tests must fail.
mutants: setup
	$(BIN)/python -m tests.mutants

# Runs the Triton kernels on the CPU, in Triton's interpreter. megablocks requires an old torch, so `pip install` could
# not resolve it beside ours; it has an environment of its own.
test-megablocks: $(VENV)-megablocks/installed
	TRITON_INTERPRET=1 $(VENV)-megablocks/bin/python -m pytest tests/megablocks

# Clients of exports whose packages conflict with those in .venv. Each has an environment on top of .venv; pip rightly
# warns that the two conflict, but only the exports are tested in it.
test-transformers4: $(VENV)-transformers4/installed
	$(VENV)-transformers4/bin/python -m pytest tests/clients/test_transformers4.py

test-llamacpp: $(VENV)-llamacpp/installed
	$(VENV)-llamacpp/bin/python -m pytest tests/clients/test_llamacpp.py

$(VENV)-transformers4/installed: CLIENT := 'transformers==4.57.6' 'huggingface_hub<1.0'
# --no-deps: megablocks requires an old torch. --no-cache-dir: pip would reuse the build with any later torch.
MEGABLOCKS := --no-deps --no-build-isolation --no-cache-dir --constraint constraints.txt megablocks stanford-stk
$(VENV)-megablocks/installed: CLIENT := $(MEGABLOCKS) triton==3.8.0
$(VENV)-megablocks/installed: CLIENT_ENV := PYTHONPATH="$$PWD/$(PLAIN)"
$(VENV)-megablocks/installed: | $(PLAIN)/sitecustomize.py
# Compiles llama.cpp, which takes minutes and needs a C++ compiler.
$(VENV)-llamacpp/installed: CLIENT := 'llama-cpp-python==0.3.36'

$(VENV)-%/installed: | setup
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/turnout.pth"
# Builds without isolation use this setuptools; the one that Python ships can be too old.
	$(@D)/bin/pip install --quiet --disable-pip-version-check 'setuptools>=77'
	$(CLIENT_ENV) $(@D)/bin/pip install --quiet --disable-pip-version-check $(CLIENT)
	@touch $@

# With this file on PYTHONPATH, torch's version has no "cu", which would make megablocks compile its CUDA code. We never
# call that code, and it does not compile with CUDA 13.
$(PLAIN)/sitecustomize.py:
	@mkdir -p $(@D)
	@echo 'import torch; torch.__version__ = torch.__version__.split("+")[0]' > $@

# Installs the expert backend megablocks, on a machine with a GPU.
megablocks: setup $(PLAIN)/sitecustomize.py
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=77'
	PYTHONPATH="$$PWD/$(PLAIN)" $(BIN)/pip install --quiet --disable-pip-version-check $(MEGABLOCKS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) $(VENV)-megablocks $(VENV)-transformers4 $(VENV)-llamacpp build *.egg-info
