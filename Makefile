# The project's commands. `make help` lists them.
#
# PYTHON=/path/to/python3.12  the interpreter the environment is made from (default: the first Python >= 3.11 found)
# VENV=folder                 where the environment stands (default: .venv)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1

.PHONY: help demo setup lint test soak clean

help: ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY) ## set up what is missing, then trace, solve and serve the bundled model
	@$(VENV)/bin/python examples/demo.py

setup: $(READY) ## set up the environment only

$(READY): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" .ci/setup "$(VENV)"

lint: $(READY) ## check style and types
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy

# pytest succeeds when every test was skipped; a run that tested nothing must not.
test: lint ## set up what is missing, then check style and types and run all tests
	@.ci/chromium
	@log="$$(mktemp)"; trap 'rm -f "$$log"' EXIT; \
	$(VENV)/bin/python -m pytest 2>&1 | tee "$$log"; \
	grep -qE '(^| )[1-9][0-9]* passed' "$$log" || { echo "error: no test was run" >&2; exit 1; }

soak: $(READY) ## serve 64 streams for 5 minutes on the CPU: no error, flat memory, no stream left behind
	@$(VENV)/bin/python -m benchmarks.serving_soak -o benchmarks/results/serving_soak.json

clean: ## remove the environment and everything made here
	rm -f "$(READY)"
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
