# What a person does with this project, one command each. `make` alone lists them.

# resnet or plainnet, for `run`
MODEL  ?=
# further options of the command, e.g. ARGS="--epochs 2"
ARGS   ?=
DATA   ?= data
RUNS   ?= runs
# the environment, and the Python to make it with (else the first suitable one of PYTHONS)
VENV   ?= .venv
PYTHON ?=
# He et al.'s 20-layer shape and its plain twin: together about a minute on 2 cores
DEMO_ARGS ?= --blocks 3,3,3 --filters 16 --epochs 10

PYTHONS := $(or $(PYTHON),python3.12 python3.11 python3.13 python3)
READY   := $(VENV)/.ready
BIN     := $(VENV)/bin
JOB     := $(BIN)/python -m job
PYTEST  := $(BIN)/python -m pytest
# where `lock` writes
LOCKS   ?= .
LOCK    := $(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --custom-compile-command "make lock"
ANY     := --universal --fork-strategy fewest --python-version 3.11
GPU     := --python-version 3.12 --python-platform x86_64-manylinux_2_39 --only-binary :all:
PLAN    := $(BIN)/uv pip install --quiet --dry-run --require-hashes --only-binary :all: \
           --python $(BIN)/python --target $(VENV)/planned

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo data run tensorboard test test-slow test-all check format lock check-lock clean

##@ Start here
help: ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## train both networks on the embedded sample and compare them (about a minute)
	$(JOB) train --model resnet --data sample --output $(RUNS)/demo $(DEMO_ARGS)
	$(JOB) train --model plainnet --data sample --output $(RUNS)/demo $(DEMO_ARGS)
	$(JOB) compare $(RUNS)/demo --report $(RUNS)/demo/report

##@ The real thing
data: $(READY) ## download CIFAR-10 into DATA and verify every file
	$(JOB) data fetch --to $(DATA) $(ARGS)

run: $(READY) ## train MODEL=resnet or MODEL=plainnet [ARGS="--epochs 2 ..."]
	@test -n "$(MODEL)" || { echo "MODEL must be resnet or plainnet, but it is empty; example: make run MODEL=resnet" >&2; exit 2; }
	$(JOB) train --model $(MODEL) $(ARGS)

tensorboard: $(READY) ## show the runs of RUNS side by side in a browser
	$(BIN)/tensorboard --logdir $(RUNS) $(ARGS)

##@ Development
test: $(READY) ## the fast tests, without a network (a few minutes) [ARGS="-k name"]
	$(PYTEST) -m "not (slow or network or container or browser)" $(ARGS)

test-slow: $(READY) ## the slow tests, and those that download
	$(PYTEST) -m "(slow or network) and not (container or browser)" $(ARGS)

test-all: $(READY) ## every test, containers and browser included
	$(PYTEST) $(ARGS)

check: $(READY) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## format the code and mend what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: $(READY) ## make the lock files again from pyproject.toml [ARGS=--upgrade]
	$(LOCK) $(ANY) $(ARGS) pyproject.toml --extra plots --group dev -o $(LOCKS)/requirements-dev.lock
	$(LOCK) $(ANY) $(ARGS) pyproject.toml -c $(LOCKS)/requirements-dev.lock -o $(LOCKS)/requirements-cpu.lock
	$(LOCK) $(GPU) $(ARGS) pyproject.toml --extra gpu -c $(LOCKS)/requirements-dev.lock -o $(LOCKS)/requirements-gpu.lock
	$(LOCK) $(ANY) $(ARGS) --group tensorboard -c $(LOCKS)/requirements-dev.lock -o $(LOCKS)/requirements-tensorboard.lock

check-lock: $(READY) ## plan the install of every lock on every platform it serves, downloading no package
	$(PLAN) $(GPU) -r requirements-gpu.lock
	for python in 3.11 3.12 3.13; do for lock in dev cpu tensorboard; do \
		$(PLAN) --python-version $$python --python-platform x86_64-manylinux_2_36 -r requirements-$$lock.lock || exit; \
	done; done

clean: ## remove the environment, caches and build output; runs and data stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find job tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, made the first time it is needed and completed when the lock changes. A Python suits when it
# runs at all (a version manager's shim may not), has the right version and can make environments.
$(READY): requirements-dev.lock pyproject.toml
	@if ! $(BIN)/python -c '$(SUITS)' 2>/dev/null; then \
		suitable=; \
		for python in $(PYTHONS); do \
			if "$$python" -c '$(SUITS)' 2>/dev/null; then suitable=$$python; break; fi; \
		done; \
		if test -z "$$suitable"; then $(NO_PYTHON); exit 1; fi; \
		echo "Making $(VENV) with $$("$$suitable" --version): once, about two minutes."; \
		"$$suitable" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r requirements-dev.lock
	@touch $@

SUITS = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
define NO_PYTHON
{ \
	echo "TensorFlow 2.21 and this job need Python 3.11, 3.12 or 3.13 with its venv module"; \
	echo "(Debian and Ubuntu: apt-get install python3-venv). What was found does not do:"; \
	for python in $(PYTHONS); do \
		echo "  $$python: $$("$$python" --version 2>/dev/null || echo not installed)"; \
	done; \
	echo "Install one, or name one: make PYTHON=/path/to/python3.12 ..."; \
} >&2
endef
