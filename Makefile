# Every target does its own set-up: it makes .venv, and nothing has to be activated. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test rehearsal drill lint report clean record restore cluster-up cluster-test cluster-down

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
TEACHER := data/teachers/tiny.dvc
REPORT := results/tiny/report/index.html
ARGS ?=
EXPERIMENT ?= micro

# The rules of the workflow call vpae, snakemake and dvc by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Make .venv, with the tested versions of everything

demo: $(READY) ## Distil the tiny teacher to one step (minutes on two cores) and write the report
	@git rev-parse --git-dir >/dev/null || { echo "make demo: DVC needs the repository itself: git clone it" >&2; exit 2; }
	$(BIN)/dvc pull $(TEACHER)
	$(BIN)/snakemake all
	@test -f $(REPORT)
	@echo $(REPORT)

test: $(READY) ## Run the tests; more arguments for pytest in ARGS="..."
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

rehearsal: $(READY) ## All stages of the 14B configuration with two blocks of its width: 12 GB, some 11 CPU-minutes
	VPAE_REHEARSAL=1 $(BIN)/pytest tests/test_full_width.py $(ARGS)

drill: $(READY) ## Kill every stage of micro at random, spoil its inputs, fill its disk; more in ARGS="--kills 50 --seed 0"
	OMP_NUM_THREADS=1 $(BIN)/python tests/drill.py $(ARGS)

lint: $(READY) ## Check style and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/codespell

report: $(READY) ## Say where the tiny experiment's report is; open it where there is a display
	@test -f $(REPORT) || { echo "$(REPORT) does not exist yet: run \`make demo\`" >&2; exit 1; }
	@test -z "$${DISPLAY:-}$${WAYLAND_DISPLAY:-}" || $(BIN)/python -m webbrowser -t "file://$(CURDIR)/$(REPORT)" >/dev/null
	@echo $(REPORT)

record: $(READY) ## Commit the finished results of EXPERIMENT=micro to DVC, if all of them are up to date
	$(BIN)/vpae record --config configs/$(EXPERIMENT).yaml

restore: $(READY) ## Pull the recorded results of EXPERIMENT=micro, check them, make them known to Snakemake
	$(BIN)/vpae restore --config configs/$(EXPERIMENT).yaml

cluster-up: $(READY) ## Start a SLURM cluster on this machine: two nodes with fake GPUs, in .cluster/ (as root)
	tests/cluster/up.sh

cluster-test: cluster-up ## Run the workflow on it, and interrupt the training in every way SLURM has
	tests/cluster/in.sh sinfo
	tests/cluster/in.sh $(BIN)/python tests/cluster/run.py

cluster-down: ## End it
	tests/cluster/down.sh

clean: ## Remove the results of the tiny and micro experiments; data/ and DVC's cache stay
	rm -rf results/tiny results/micro

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv: once, a few minutes"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
# torch first and alone, so that a CPU build already configured in pip wins over the default CUDA build.
	$(BIN)/pip install -qq -c constraints.txt torch==2.13.0
	$(BIN)/pip install -qq -c constraints.txt -e '.[dev,remotes]'
	@touch $@
