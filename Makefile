PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test fast lint proto

# Self-play in the built-in world: trains a base, improves it, writes a report. Minutes on two cores.
run: $(VENV)/.installed
	$(BIN)/python launch.py spell world=ledger

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# Without Ray and without training runs.
fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not ray and not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m protocols.codegen --check

proto: $(VENV)/.installed-dev
	$(BIN)/python -m protocols.codegen

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed
