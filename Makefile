# Every target sets up what it needs in .venv, works from any folder (paths are relative: make splits names at spaces)
# and is safe to run again: what is still valid is kept, what was interrupted goes on.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

OBJECTIVE ?= unialign
OBJECTIVES := infonce gram unialign
DATA := data/moving-digits
RUN := runs/demo-$(OBJECTIVE)

# One process on all cores. `--quiet`: the program's own last line says what went wrong, not the launcher's traceback.
LAUNCH := .venv/bin/accelerate launch --config_file launch/cpu.yaml --num_cpu_threads_per_process $(shell nproc) --quiet
PYTEST := HF_HUB_OFFLINE=1 WANDB_MODE=offline .venv/bin/python -m pytest

# Without cached bytecode every start would compile thousands of modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo demo-objectives test test-slow lint env

help: ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: env ## data, training, evaluation, report in minutes on a CPU; OBJECTIVE=infonce, gram or unialign (the default)
	.venv/bin/trivium prepare moving-digits --out $(DATA)
	$(LAUNCH) -m trivium.pretrain demo objective=$(OBJECTIVE) run=$(RUN)
	$(LAUNCH) -m trivium.evals --model $(RUN) --split test --if-needed
	.venv/bin/trivium report $(RUN)

demo-objectives: env ## the demo with each objective, then their numbers side by side
	@for objective in $(OBJECTIVES); do $(MAKE) --no-print-directory demo OBJECTIVE=$$objective || exit 1; done
	.venv/bin/trivium compare $(OBJECTIVES:%=runs/demo-%)

test: env ## the test suite
	$(PYTEST) -m "not slow"

test-slow: env ## the long test campaigns
	$(PYTEST) -m slow

lint: env ## style: ruff
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

env: ## only the environment: .venv with Trivium and its dependencies
	@bash launch/venv.sh
