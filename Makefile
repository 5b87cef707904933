# demo: the founding experiment, from nothing to a report.  test: the test suite.
# gpu: on a machine with a GPU, the tests that need one and both benchmarks, within 8 minutes; docs/benchmarks/gpu.md.
# reproduction: the figures of docs/reproduction.md again, from CIFAR-10 in DATA=FOLDER or downloaded; it goes on after a kill.
# test-lowest: the test suite with the lowest versions that pyproject.toml allows; part of a release.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest
# Two processes of one thread each: threads that wait for each other are slower than one.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: setup demo test test-slow test-lowest gpu reproduction lint types clean

demo: setup
	$(BIN)/normzoo sweep quickstart

test: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu"

test-lowest: $(LOWEST)/.ready
	$(ONE_THREAD) $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

gpu: setup
	$(BIN)/python benchmarks/gpu.py

reproduction: setup
	$(BIN)/python benchmarks/reproduction.py $(if $(DATA),--data $(DATA)) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"normzoo needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --compile-bytecode --editable '.[dev]'
	@touch $@

$(LOWEST)/.ready: pyproject.toml | setup
	rm -rf $(LOWEST)
	$(BIN)/python -m venv $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --compile-bytecode --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv $(LOWEST) build dist *.egg-info runs
