# make venv | test | fast | fuzz | lint | types | size | demo | clean | help
#
# Everything runs in .venv, which is rebuilt whenever pyproject.toml or constraints.txt changes.
# Another interpreter: make PYTHON=python3.12 venv. Another torch build (an index of CPU or CUDA
# wheels, say): pip's own variables, such as PIP_EXTRA_INDEX_URL, reach the installation.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := mining,eval,report,data,synthesis

# Two test processes; more threads than cores would only slow each other down.
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: help venv test fast fuzz lint types size demo clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(READY)  ## build the virtual environment .venv with the package and all its tools

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kalm_min needs Python 3.11 or newer: make PYTHON=python3.12")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "pip>=25.1"
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]" --group dev
	touch $@

test: lint types  ## check lint, format and types, and run all tests
	$(PYTEST)

fast: $(READY)  ## run the quick tests
	$(PYTEST) -m "not slow and not network and not gpu"

fuzz: $(READY)  ## edit every kind of file that is read at random: make fuzz INPUTS=10000 SEED=1
	$(BIN)/python tests/fuzz.py --inputs $(or $(INPUTS),1000) --seed $(or $(SEED),0)

lint: $(READY)  ## check lint rules and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## check types with pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

size: $(READY)  ## print the size of the package, part by part
	$(BIN)/python benchmarks/size.py

demo: $(READY)  ## train and evaluate a small model on the documentation of Python's standard library
	$(BIN)/python examples/demo.py

clean:  ## remove the environment, caches and what the demo wrote
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
