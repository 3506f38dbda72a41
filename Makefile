# Every target makes its own environment first (VENV, rebuilt only when the locks change). Start with: make help
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help env serve test check lint format types unit bench lock clean

help: ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo '  VENV=DIR uses another environment than .venv; ARGS="..." goes to the server or benchmark'

env: ## Make or update the environment
	@scripts/environment.sh $(VENV)

serve: env ## Serve a model (default: a small demo model) on http://127.0.0.1:30000; ARGS="--model-path DIR ..."
	$(PY) -m sglang_adrenaline.launch_server $(ARGS)

test: check ## Lint, format check, types and all tests
	$(PY) -m pytest $(PYTEST_ARGS)

check: lint types

lint: env ## Lint and format check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: env ## Apply lint fixes and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: env
	$(PY) -m mypy

unit: env ## Tests that start no servers, fast
	$(PY) -m pytest test/unit $(PYTEST_ARGS)

bench: env ## Stock PD against offloading on this machine, same requests
	$(PY) benchmark/compare_cpu.py $(ARGS)

lock: env ## Resolve the dependencies anew, keeping versions where possible
	{ head -2 requirements.lock; uv pip compile pyproject.toml --extra test --constraint requirements.lock --universal \
		--python-version 3.11 --no-annotate --no-header --no-emit-index-url; } >requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
