# Everything below works on a fresh machine with Python 3.11 or newer; it installs into .venv (and, where
# there is npm, the linter of the page's JavaScript into node_modules) and nowhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_RUN ?= runs/demo
NODE_MODULES := $(if $(shell command -v npm || true),node_modules/.package-lock.json)
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --durations 20
SLOW_TESTS := cli e2e report server train test_download.py test_notebook.py engine/test_speculative.py

.DEFAULT_GOAL := help
.PHONY: help demo format lint test test-fast test-all coverage build test-wheel bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.core ## set up, train a GPT on Shakespeare, write samples and a report
	$(BIN)/gptsmith train tinyshakespeare --preset shakespeare-3min --out $(DEMO_RUN)
	@echo "open $(DEMO_RUN)/report.html in a browser"

format: $(VENV)/.dev $(NODE_MODULES) ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NODE_MODULES),npm run --silent format)

lint: $(VENV)/.dev $(NODE_MODULES) ## check style, types, the direction of imports and, with Node, the page's JavaScript
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(NODE_MODULES),npm run --silent lint,@echo "no npm here: the page's JavaScript is not checked")

test: $(VENV)/.dev ## run the tests; with COVERAGE=1 print how much of src they run
	$(PYTEST) $(if $(COVERAGE),--cov --cov-report=term --cov-report=html --cov-fail-under=90)

test-fast: $(VENV)/.dev ## run the tests that take a minute or two: without commands, server and training
	$(PYTEST) $(SLOW_TESTS:%=--ignore=tests/%)

test-all: $(VENV)/.dev ## run all tests, the slow ones too
	GPTSMITH_TESTS=all $(PYTEST) -m "slow or not slow"

coverage: $(VENV)/.dev ## run the tests, print how much of src they run and write htmlcov/index.html
	$(MAKE) test COVERAGE=1

build: $(VENV)/.dev ## build the source distribution and, from it, the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

test-wheel: build ## use the built wheel in a clean environment
	$(BIN)/python .ci/smoke_wheel.py dist/*.whl

bench: $(VENV)/.dev ## run the benchmarks and save their results (takes hours)
	$(BIN)/python benchmarks/demo.py --save
	$(BIN)/python benchmarks/nanogpt_cpu.py --save
	$(BIN)/python benchmarks/prepare_memory.py --save
	$(BIN)/python benchmarks/sliding_window.py --save
	$(BIN)/python benchmarks/experts.py --save
	$(BIN)/python benchmarks/imported.py --save
	$(BIN)/python benchmarks/startup.py --save

clean: ## remove the environment, caches and built files
	rm -rf $(VENV) node_modules dist htmlcov .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptsmith needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.core

node_modules/.package-lock.json: package.json package-lock.json
	npm ci --loglevel=error --no-audit --no-fund
	@touch $@
