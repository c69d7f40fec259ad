# Everything runs from .venv, which `make setup` builds from requirements-dev.txt.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation
N ?= 100000
JOBS ?= 2
ARGS ?=

.PHONY: help setup demo test lint format simulate bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv (PYTHON=python3.12 chooses the Python)

# All output goes to standard error, so that `make -s bench` prints nothing but its results.
# What builds packages comes first, since without build isolation pip fetches nothing that has no hash here.
$(STAMP): requirements-dev.txt requirements-build.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.11 or later, or name one: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  "Phalanx needs Python 3.11 or later; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 …" % v[:2])' >&2
	@rm -f $(STAMP)
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) >&2 || \
	  { echo "no environment could be made; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(PIP) --require-hashes -r requirements-build.txt >&2
	$(PIP) --require-hashes -r requirements-dev.txt >&2
	$(PIP) --no-deps -e . >&2
	@touch $(STAMP)

demo: $(STAMP) ## a cluster on this machine; watch its failovers
	@$(BIN)/python -m examples.demo $(ARGS)

# Most tests wait, for processes to start and for TTLs to pass: so one process per core shares them, whole files
# each. What measures time comes after that, alone. Both run, whatever the first has found.
test: lint ## everything: lint, types, unit, conformance, simulation, end to end; with coverage
	$(BIN)/coverage erase
	@status=0; \
	$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile -m "not alone" --cov --cov-report= $(ARGS) || status=$$?; \
	$(BIN)/pytest -m alone --cov --cov-append --cov-report= $(ARGS) || status=$$?; \
	exit $$status
	$(BIN)/coverage report
	@echo "coverage: $$($(BIN)/coverage report --format=total) % of lines and branches (processes that tests start are not measured)"

lint: $(STAMP) ## ruff, pyright, import-linter; docs/configuration.md is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m phalanx.config.reference | diff -u docs/configuration.md - || \
	  { echo "docs/configuration.md is out of date: make docs" >&2; exit 1; }

format: $(STAMP) ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

simulate: $(STAMP) ## N=100000 schedules of the simulator, on all cores
	@$(BIN)/python -m tests.simulation --schedules $(N) $(ARGS)

bench: $(STAMP) ## benchmarks; ARGS='failover.sigkill --runs 20 --json'
	@$(BIN)/python -m benchmarks $(ARGS)

docs: $(STAMP) ## write the generated pages anew
	$(BIN)/python -m phalanx.config.reference docs/configuration.md

clean: ## remove .venv and all that was generated
	rm -rf $(VENV) build dist src/*.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
