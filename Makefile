# Longrun: every target sets up what it needs. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m

.PHONY: help setup setup-dev demo test test-full lint bench serve clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or give it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of packages: reinstalled when pyproject.toml changes, and not otherwise.
$(VENV)/.setup: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.setup-dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.setup

setup: $(VENV)/.setup ## make .venv and install Longrun
setup-dev: $(VENV)/.setup-dev ## also what tests and lint need

demo: setup ## raw text to a verified model in minutes, ending with runs/demo/report.html
	$(RUN) launchers.lifecycle lifecycle=demo

test: setup-dev ## the quick lane: unit tests, oracles, parity, one run end to end
	$(RUN) pytest -m "not slow and not vllm and not gpu"

test-full: setup-dev ## everything that this machine can run
	$(RUN) pytest

lint: setup-dev ## ruff, mypy, known vulnerabilities of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) tools.dependencies

bench: setup-dev ## throughput, checkpoint cost, bytes sent, engines side by side
	$(RUN) tools.bench bench=throughput
	$(RUN) tools.bench bench=checkpoint
	$(RUN) tools.bench bench=communication
	$(RUN) tools.bench bench=engines
	$(RUN) tools.bench bench=order
	$(RUN) tools.bench bench=loader
	$(RUN) tools.bench bench=tokenise
	$(RUN) tools.bench bench=curation
	$(RUN) tools.bench bench=faults

serve: setup ## build vLLM's own environment and serve the demo's export on loopback
	$(RUN) tools.serve target=runs/demo/export

clean: ## remove environments and caches, keep runs/
	rm -rf $(VENV) .vllm .pytest_cache .mypy_cache .ruff_cache
