# One command per chore; CI runs the same ones. uv is used where it is installed, venv and pip otherwise.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install --disable-pip-version-check)

.PHONY: setup demo test lint types unit build bench profiles test-vllm constraints clean

demo: setup  ## the whole system on this machine
	$(BIN)/block demo

test: setup lint types unit  ## what CI runs

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Block needs Python 3.11 or newer: set PYTHON=python3.11, for example.")'
	$(if $(shell command -v uv),uv venv --quiet --allow-existing --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
	$(INSTALL) -q -c constraints.txt -e '.[dev]'
	@touch $@

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

unit:
	$(BIN)/pytest -n 2

test-vllm: setup  ## real vLLM on this machine's CPU: 2 GB into .venv-vllm; 1 minute to install, 8 to run
	tools/vllm/install.sh $(VENV)-vllm
	BLOCK_VLLM_ENV=$(VENV)-vllm $(BIN)/pytest tests/vllm

profiles: setup  ## fit the shipped step-time profiles again: make profiles RUNS=path/to/h200-vllm VIDUR=path/to/vidur-a30
	$(BIN)/python bench/fit_profiles.py $(RUNS) $(if $(VIDUR),--vidur $(VIDUR))

build:  ## recompile the engine model after editing it
	$(BIN)/python setup.py -q build_ext --inplace

constraints:  ## pin what is installed now
	(head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable) > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf build dist src/*.egg-info
	find src -name '*.so' -delete -o -name '*.c' -delete
