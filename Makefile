# Every task of the project. People, hooks and CI run these same ones; `make help` lists them.
#
# Variables:
#   PYTHON      interpreter that makes the environment (3.11)
#   TORCH       which torch, as pip understands it; another version, or a path to a wheel
#   TORCH_ARGS  further pip arguments for torch alone, such as --index-url for another build
#   RECIPE      recipe of `make demo`
#   TURN        turn that `make demo` runs until there is one: 2 goes on from the first; default: the latest
#   ARGS        further arguments for pytest (test, golden), a benchmark (bench) or the replay
#   IMAGES      which images `make images` builds, of cpu gpu render; default: all of CLUSTER
#   REGISTRY    comes before their names, as registry.example.com/team
#   PUSH        1: push them, and print their digests
#   CLUSTER     overlay of infra/overlays that is to run them
#   GPU_TORCH_ARGS  TORCH_ARGS of gpu and render; TORCH_ARGS serves cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
RECIPE ?= demo
TURN ?=
ARGS ?=
IMAGES ?=
REGISTRY ?=
PUSH ?=
CLUSTER ?=
GPU_TORCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
PIPELINES = $(patsubst pipelines/%/pipeline.py,%,$(wildcard pipelines/*/pipeline.py))
ARTIFACT := $(BIN)/flowloom artifact
# `rounds` first: others look at what it trains.
BENCHMARKS = rounds $(filter-out rounds,$(patsubst benchmarks/%.py,%,$(shell grep -l '^def main' benchmarks/*.py)))
OVERLAYS = $(patsubst infra/overlays/%/kustomization.yaml,%,$(wildcard infra/overlays/*/kustomization.yaml))
CODE = $(wildcard src tests components pipelines benchmarks infra)

# Busy waiting of OpenMP threads costs far more than it gains; nothing here asks a hub or reports.
export OMP_WAIT_POLICY := passive
export PYTHONHASHSEED := 0
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

SHELL := /bin/sh
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup data demo test check format bench compile golden images replay manifests

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp data ## Make .venv from the lock and fetch data/ from the seed remote

demo: ## The whole loop on this machine, from data to a champion; run again to resume
	@started=$$(date +%s); \
	$(MAKE) --no-print-directory setup; \
	ready=$$(date +%s); \
	$(PY) -m pipelines run continuous_training --recipe $(RECIPE) $(if $(TURN),--turn $(TURN)); \
	echo "set-up $$((ready - started)) s, demo $$(($$(date +%s) - ready)) s"

test: setup ## Run the tests (ARGS="-k name" for some)
	$(PY) -m pytest $(ARGS)

check: $(VENV)/.stamp ## Format, lint, types and layers, without changing a file
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/basedpyright --pythonpath $(PY)
	$(BIN)/lint-imports --no-cache
	$(PY) -m components --check

format: $(VENV)/.stamp ## Format, and mend what the linter can mend
	$(BIN)/ruff check --fix --exit-zero --quiet $(CODE)
	$(BIN)/ruff format $(CODE)

bench: setup ## Run every benchmark (ARGS=--quick: at most a minute each)
	@for name in $(BENCHMARKS); do $(PY) -m benchmarks.$$name $(ARGS); done

compile: $(VENV)/.stamp ## Compile every pipeline to build/NAME.yaml
	@mkdir -p build
	@for name in $(PIPELINES); do $(PY) -m pipelines compile $$name --out build/$$name.yaml; done

golden: setup ## Rewrite the golden files under tests/; read the diff before committing it
	$(PY) -m pytest -m golden --update-golden $(ARGS)

images: setup ## Build the images of infra/Dockerfile (REGISTRY, PUSH=1, CLUSTER=prod: see above)
	$(PY) -m infra.images $(IMAGES) --torch '$(TORCH)' --torch-args='$(TORCH_ARGS)' \
	  --gpu-torch-args='$(GPU_TORCH_ARGS)' $(if $(REGISTRY),--registry '$(REGISTRY)') \
	  $(if $(filter 1,$(PUSH)),--push) $(if $(CLUSTER),--cluster '$(CLUSTER)')

replay: setup ## Run the Dockerfile's steps without an engine (ARGS="--target gpu" for another image)
	$(PY) -m tests.infra.replay $(ARGS)

manifests: ## Render every overlay to build/overlays/NAME.yaml (kubectl 1.31 or later)
	@mkdir -p build/overlays
	@for name in $(OVERLAYS); do kubectl kustomize infra/overlays/$$name >build/overlays/$$name.yaml; done

$(VENV)/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v[:2] == (3, 11) else f"PYTHON: got {v[0]}.{v[1]}, expected Python 3.11; name one with make PYTHON=...")'
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_ARGS) $(TORCH)
	$(PIP) install --quiet --no-deps --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# dvc takes seconds to start, so it is asked only when data/ is not what data.dvc records; it copies
# damaged objects without a word, so that those of the remote are checked before, and data/ after.
data: $(VENV)/.stamp
	@test ! -f data.dvc || $(ARTIFACT) verify data.dvc data >/dev/null 2>&1 \
	|| { $(ARTIFACT) verify --remote seed data.dvc >&2 \
	  || { echo "data-seed/ is damaged; git checkout data-seed restores it" >&2; exit 1; }; \
	  $(BIN)/dvc pull --quiet --remote seed data.dvc; $(ARTIFACT) verify data.dvc data >&2; } \
	|| { echo "data/: got other files than data.dvc records; 'dvc add data' records yours, 'rm -r data .dvc/cache && make data' brings back its own" >&2; exit 1; }
