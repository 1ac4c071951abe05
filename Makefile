# Every target sets up what it needs: a virtual environment in .venv, with Python 3.11 or newer.

PYTHON ?= $(shell for p in python3.15 python3.14 python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILD_TOOLS := $(VENV)/.build-tools

# Interpreter variables (PYTHON*) of the environment do not reach the recipes; TEST_ENV sets some for the tests.
$(foreach name,$(filter-out PYTHON,$(filter PYTHON%,$(.VARIABLES))),$(eval unexport $(name)))
TEST_ENV ?=
TEST_PROCESSES ?= 6

.DEFAULT_GOAL := help
.PHONY: help demo serve test coverage soak bench lint ruff ruff-format mypy codespell format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## start a server, send it a message, stop it
	@: >$(VENV)/demo.out
	@$(BIN)/python -m echo_async.server --port 0 >$(VENV)/demo.out 2>$(VENV)/demo.log & server=$$!; \
	trap 'kill $$server 2>/dev/null' EXIT; \
	until grep listening $(VENV)/demo.out; do kill -0 $$server || { cat $(VENV)/demo.log; exit 1; }; sleep 0.1; done; \
	$(BIN)/python -m echo_async.client --port "$$(sed 's/.*://' $(VENV)/demo.out)" && \
	kill -INT $$server && wait $$server && echo 'server stopped with exit code 0; its log:' && cat $(VENV)/demo.log

serve: $(INSTALLED) ## run the server on 127.0.0.1:5500 until Ctrl-C
	@$(BIN)/python -m echo_async.server

test: $(INSTALLED) ## run the tests
	@env $(TEST_ENV) $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

coverage: $(INSTALLED) ## run the tests and report branch coverage
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q -n $(TEST_PROCESSES) --dist worksteal
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

soak: $(INSTALLED) ## run tests that take minutes: many clients, faulty clients, killed workers
	@$(BIN)/python tests/soak.py

bench: $(INSTALLED) ## measure the engines and event loops: table, bench.json, docs/benchmarks.svg
	@$(BIN)/python -m echo_async.bench compare --save bench.json --plot docs/benchmarks.svg

lint: ruff ruff-format mypy codespell ## check style, types and spelling

ruff: $(INSTALLED)
	$(BIN)/ruff check

ruff-format: $(INSTALLED)
	$(BIN)/ruff format --check

mypy: $(INSTALLED)
	$(BIN)/mypy

codespell: $(INSTALLED)
	$(BIN)/codespell

format: $(INSTALLED) ## fix and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(INSTALLED) $(BUILD_TOOLS) ## build sdist and wheel in dist/, check them, use the wheel in an empty environment
	rm -rf dist
	@$(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*
	@.ci/check-wheel $(BIN)/python

clean: ## remove the virtual environments and all generated files
	rm -rf $(VENV) .venv-* build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(INSTALLED)

$(BUILD_TOOLS): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	@touch $(BUILD_TOOLS)
