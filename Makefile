# Every target works alone on a fresh machine with git, make and Python 3.11 or newer: each makes
# what it needs first. Choose another interpreter with `make demo PYTHON=python3.13`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Two test files at a time: what begins processes and waits for them leaves a core without work.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help demo test test-slow test-all nightly lint clean

help:
	@echo "make demo      make a volume, run the whole chain on it, leave labels and pictures"
	@echo "make test      ruff, mypy and the tests"
	@echo "make test-slow the tests that take minutes: batch clusters, every fault in every stage"
	@echo "make test-all  both"
	@echo "make nightly   the one-answer properties, thousands of cases"
	@echo "make clean     remove $(VENV) and what the targets left"

# The demo needs only what a user needs; the tests need the rest too. A changed pyproject.toml
# installs again, nothing else does (the package itself is installed editable).
demo: $(VENV)/.installed-view
	$(BIN)/topo-dask demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

test-all: test test-slow

nightly: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m nightly --hypothesis-profile=nightly --timeout=0

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; say where: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): about a minute the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
