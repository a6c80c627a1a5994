# Everything below works on a fresh machine with Python 3.11 or newer; it installs into .venv and nowhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_RUN ?= runs/demo

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.core
	$(BIN)/gptsmith train tinyshakespeare --preset shakespeare-3min --out $(DEMO_RUN)
	@echo "open $(DEMO_RUN)/report.html in a browser"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadscope

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadscope -m "slow or not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/demo.py --save
	$(BIN)/python benchmarks/nanogpt_cpu.py --save
	$(BIN)/python benchmarks/prepare_memory.py --save
	$(BIN)/python benchmarks/banded_attention.py --save
	$(BIN)/python benchmarks/experts.py --save
	$(BIN)/python benchmarks/imported.py --save
	$(BIN)/python benchmarks/startup.py --save

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptsmith needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.core
