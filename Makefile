# `make demo` and `make test` each do all set-up on a fresh machine: a virtual environment in .venv with pinned PyTorch.
# PyPI's torch for Linux is the CUDA build; TORCH_INDEX=URL takes it from another index, such as PyTorch's CPU one.

PYTHON ?= python3
TORCH_INDEX ?=
# Processes that run the tests; each takes up to 2 GB.
PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is, and keeps it; all that is installed would take a minute or two.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

.PHONY: demo test lint setup clean

demo: $(VENV)/.base
	$(BIN)/mezzotint demo --out demo

test: $(VENV)/.dev lint
	$(BIN)/pytest --durations=15 --numprocesses $(PROCESSES) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL)$(if $(TORCH_INDEX), --index-url $(TORCH_INDEX)) torch
	$(INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
