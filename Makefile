# Everything here sets itself up: a virtual environment in .venv, from Python 3.11 or newer.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# No variable of the interpreter's reaches a recipe from the environment; TEST_ENV sets some for the tests.
$(foreach name,$(filter-out PYTHON,$(filter PYTHON%,$(.VARIABLES))),$(eval unexport $(name)))
TEST_ENV ?=

.DEFAULT_GOAL := help
.PHONY: help demo serve test coverage soak bench lint format clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## start a server, send it a message, stop it
	@$(BIN)/python -m echo_async.server --port 0 >$(VENV)/demo & server=$$!; trap 'kill $$server 2>/dev/null' EXIT; \
	until grep listening $(VENV)/demo; do kill -0 $$server || exit 1; sleep 0.1; done; \
	$(BIN)/python -m echo_async.client --port "$$(sed 's/.*://' $(VENV)/demo)" && \
	kill -INT $$server && wait $$server && echo 'the server has stopped cleanly'

serve: $(INSTALLED) ## run the server on 127.0.0.1:5500 until Ctrl-C
	@$(BIN)/python -m echo_async.server

test: $(INSTALLED) ## run the tests
	@env $(TEST_ENV) $(BIN)/python -m pytest -q -n 4

coverage: $(INSTALLED) ## run the tests, and show which branches they reach
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q -n 4
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

soak: $(INSTALLED) ## show what takes minutes: many clients, faulty clients, restarts
	@$(BIN)/python tests/soak.py

bench: $(INSTALLED) ## measure the engines and event loops: table, bench.json, docs/benchmarks.svg
	@$(BIN)/python -m echo_async.bench compare --save bench.json --plot docs/benchmarks.svg

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## put the code in its format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what was made
	rm -rf $(VENV) .venv-* build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(INSTALLED)
