# `make help` lists the targets. PYTHON is only used to create .venv: make quickstart PYTHON=python3.12
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ROOMS  := model data_prep recipes launch demo
PIP    := $(BIN)/pip --disable-pip-version-check install -c constraints.txt
# Tests that need neither processes of their own nor a browser: several files at a time.
UNIT   := $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -m "not process and not cluster and not browser and not long"
SHELL  := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# folders too, so that a deleted module counts as a change
SOURCES := $(shell find $(ROOMS) \( -name __pycache__ -o -name datasets \) -prune \
             -o \( -name '*.py' -o -type d \) -print 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart compare test test-long check lint format types contracts clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## install, then shard, train, evaluate and export on the bundled data
	$(BIN)/python -m convnext_yolo.launch.quickstart

compare: $(VENV)/.installed  ## the study's design against ours, two seeds each: 15 minutes
	$(BIN)/python -m convnext_yolo.launch.compare

test: lint types contracts  ## install, then every check, real processes and browser included
	$(UNIT)
	$(BIN)/pytest -m "(process or cluster or browser) and not long"

test-long: $(VENV)/.installed-dev  ## the full matrices: hours
	$(BIN)/pytest -m long

check: lint types contracts  ## the developer's loop: no processes, no browser
	$(UNIT)

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## ruff: mend what can be mended
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

types: build/.types-ok  ## mypy, on the built wheel

contracts: $(VENV)/.installed-dev  ## import-linter: which room may import which
	$(BIN)/lint-imports

clean:  ## remove what was built and cached; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(ROOMS) tests -name __pycache__ -prune -exec rm -rf {} +

# build/ goes first: setuptools would put modules that are deleted since into the wheel.
# sed turns the wheel's paths into those of the sources.
build/.types-ok: $(SOURCES) setup.cfg pyproject.toml | $(VENV)/.installed-dev
	rm -rf build && mkdir build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >build/wheel.log 2>&1 \
	  || { cat build/wheel.log; exit 1; }
	$(BIN)/pip --disable-pip-version-check install --quiet --no-deps --target build/types build/wheel/*.whl
	$(BIN)/mypy | sed 's#build/types/convnext_yolo/##'
	touch $@

# A stamp is written when all before it went well, so that an interrupted install is taken up again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "$(PYTHON) is not Python 3.10 or later: name one that is, as in 'make PYTHON=python3.11 $(or $(MAKECMDGOALS),quickstart)'." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) -e '.[train,demo]'
	@touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) -e '.[train,demo,dev]'
	@touch $(VENV)/.installed $@
