# Two commands do everything on a machine that has Python >= 3.11, a C++ compiler and git:
#   make demo    pack real video, pre-train a small VideoMAE on it, kill it, resume it, look at the result
#   make test    lint, types, tests
# Both create .venv on first use and reuse it.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := .ci/constraints.txt
# Tests and tools that a variable selects from outside: make test TESTS=tests/models
TESTS ?= tests
# Processes that run tests, 0: this one. Launches of two ranks fill two cores by themselves; with four or more, WORKERS=2
# is faster.
WORKERS ?= 0

.PHONY: help install demo test faults soak lint types bench clean

help:
	@echo "make demo   run the main job end to end on this machine (about 10 minutes)"
	@echo "make test   ruff, mypy, pytest (TESTS=path to select, WORKERS=processes)"
	@echo "make faults all faults in all phases, then the tests that take minutes each; writes docs/reliability.md (an hour)"
	@echo "make soak   half an hour of training with a fault about every minute"
	@echo "make bench  benchmarks that need no GPU, and a table of their ratios (below 15 minutes, on an idle machine)"
	@echo "make lint   ruff, hadolint and shellcheck only"
	@echo "make types  mypy only"
	@echo "make clean  remove what demo made (.cache/demo, runs/demo); .venv stays"

install: .venv/installed

.venv/installed: pyproject.toml $(CONSTRAINTS)
	@echo "== installing into .venv (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $$($(PYTHON) --version) found: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch torchvision
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,s3,hf,language,arrays,raster,torchcodec,onnx,plot,detection]'
	@touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: lint types
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

# The results of both lie in FAULTS; each writes the page anew from all that is there.
FAULTS ?= .cache/faults

faults: install
	mkdir -p $(FAULTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/faults/matrix.py --json $(FAULTS)/matrix.json; matrix=$$?; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "faults or not faults" tests/slurm \
		--junitxml=$(FAULTS)/slurm.xml; slurm=$$?; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m faults tests --ignore=tests/slurm; rest=$$?; \
	$(BIN)/python tests/faults/report.py $(FAULTS) docs/reliability.md; exit $$((matrix + slurm + rest))

soak: install
	mkdir -p $(FAULTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/faults/soak.py --json $(FAULTS)/soak.json; soak=$$?; \
	$(BIN)/python tests/faults/report.py $(FAULTS) docs/reliability.md; exit $$soak

bench: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python bench/all.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run launch/demo.sh launch/slurm/*.sh launch/slurm/*.sbatch

types: install
	$(BIN)/mypy

clean:
	rm -rf .cache/demo runs/demo
