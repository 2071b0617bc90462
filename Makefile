# One command per chore; CI runs the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup build test lint types check demo clean

setup: $(BIN)/block

$(BIN)/block: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

build:  ## recompile the engine model after editing it
	$(BIN)/python setup.py -q build_ext --inplace

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

test: setup
	$(BIN)/pytest -n 2

check: lint types test

demo: setup
	$(BIN)/block demo

clean:
	rm -rf build dist src/*.egg-info
	find src -name '*.so' -delete -o -name '*.c' -delete
