# Two commands: `make demo` shows it working, `make test` proves it. The environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check
# Each worker of pytest computes on one thread: more threads than cores make the suite slower.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest \
	-n $(WORKERS) --maxprocesses 4 --dist worksteal --durations 25

.PHONY: help demo test test-all coverage install lint docs clean

help:
	@echo "make demo      the fmrlrec example on its embedded data, from nothing to sliced models"
	@echo "make test      the tests that need no GPU and no patience"
	@echo "make test-all  every test: minutes to hours, GPU tests where there is one"
	@echo "make coverage  the quick tests in random order, and which branches of the library they take"
	@echo "make lint      ruff and pyright, as CI runs them"
	@echo "make docs      the documentation, built strictly into site/"
	@echo "make clean     remove the environment and what was built"

demo: $(VENV)/demo.stamp
	$(BIN)/python -m examples.fmrlrec run

test: $(VENV)/all.stamp
	$(PYTEST) --timeout 300 -m "not slow and not gpu"

test-all: $(VENV)/all.stamp
	$(PYTEST)

# One process, one file of measures: in any order the tests must pass, and the seed is printed.
SEED ?= 0
coverage: $(VENV)/all.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q -m "not slow and not gpu" \
		--random-order --random-order-seed=$(SEED)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered --sort=cover

install: $(VENV)/all.stamp

lint: $(VENV)/all.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

docs: $(VENV)/all.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $(PYTHON) is too old or absent; matryoshkafy needs Python 3.10 or newer." >&2; \
		echo "      Name one: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What is installed follows pyproject.toml, so a call with nothing changed installs nothing.
$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (torch alone may be several GB) ..."
	$(PIP) --editable ".[fmrlrec]"
	@touch $@

$(VENV)/all.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (torch alone may be several GB) ..."
	$(PIP) --editable ".[all]"
	@touch $@ $(VENV)/demo.stamp
