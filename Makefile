# What a person does with this project, one command each. `make` alone lists them.

# resnet or plainnet, for `run`
MODEL  ?=
# further options of the command, e.g. ARGS="--epochs 2"
ARGS   ?=
DATA   ?= data
RUNS   ?= runs
# for `run`: the job's own variables, where these two are not given
RUN_DATA   := $(if $(filter file,$(origin DATA)),$(JOB_DATA))
RUN_OUTPUT := $(if $(filter file,$(origin RUNS)),$(JOB_OUTPUT))
# the environment, and the Python to make it with (else the first suitable one of PYTHONS)
VENV   ?= .venv
# for `bench`: 1, or a Python that has PyTorch
TORCH  ?=
PYTHON ?=
# He et al.'s 20-layer shape and its plain twin: small batches, so that batch norm's moving statistics warm up
DEMO_ARGS ?= --blocks 3,3,3 --filters 16 --epochs 10 --batch-size 20

# The experiment: its runs, which shapes and seeds of them, the options of the article's twins
EXPERIMENT ?= $(RUNS)/experiment
SHAPES  ?= 3,3,3 9,9,9
FILTERS ?= 16
SEEDS   ?= 0 1 2
ARTICLE ?= --blocks 2,5,5,2 --filters 64
# of its computations: one for all machines, so that their runs belong together
PRECISION ?= bfloat16
TWINS    = $(foreach model,resnet plainnet,$(call TRAIN,--model $(model) $(1)))

PYTHONS := $(or $(PYTHON),python3.12 python3.11 python3.13 python3)
READY   := $(VENV)/.ready
BIN     := $(VENV)/bin
JOB     := $(BIN)/python -m job
PYTEST  := $(BIN)/python -m pytest
# two processes; the tests of one file stay in one
TOGETHER := -n 2 --dist loadfile
# where `lock` writes
LOCKS   ?= .
LOCK    := $(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --custom-compile-command "make lock"
ANY     := --universal --fork-strategy fewest --python-version 3.11
GPU     := --python-version 3.12 --python-platform x86_64-manylinux_2_39 --only-binary :all:
PLAN    := $(BIN)/uv pip install --quiet --dry-run --require-hashes --only-binary :all: \
           --python $(BIN)/python --target $(VENV)/planned

# Containers: docker or podman; the images' name, with a registry before it and a tag behind it where you want them
DOCKER      ?= docker
EPOCHS      ?=
OUTPUT      ?= $(RUNS)
PORT        ?= 6006
# a tilde that the shell has left as it is
$(foreach name,DATA RUNS EXPERIMENT OUTPUT,$(eval override $(name) := $$(patsubst ~/%,$$(HOME)/%,$$($(name)))))
# further options of the engine's `build` and `run`
BUILD_ARGS  ?=
DOCKER_ARGS ?=
VERSION     := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
IMAGE_TAG    = $(or $(word 2,$(subst :, ,$(notdir $(IMAGE)))),$(VERSION))
IMAGE_NAME   = $(or $(patsubst %:$(IMAGE_TAG),%,$(IMAGE)),cifar-residual-job)
JOB_IMAGE    = $(IMAGE_NAME):$(IMAGE_TAG)
BOARD_IMAGE  = $(IMAGE_NAME)-tensorboard:$(IMAGE_TAG)
BUILD        = $(DOCKER) build --build-arg VERSION=$(VERSION) $(BUILD_ARGS) \
               --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown)

# Kubernetes: what k8s-validate checks against, the oldest and the newest version that will do
KUBERNETES := 1.31 1.37
NAMESPACE  := cifar-residual-job
OURS       := app.kubernetes.io/part-of=$(NAMESPACE)
TRAINING   := app.kubernetes.io/component=training
OVERLAY    ?=
ALL        ?=
# the user's own kubectl, which knows the way into their cluster, else the environment's
KUBECTL    ?= $(or $(shell command -v kubectl),$(BIN)/kubectl)
CLUSTER     = $(KUBECTL) --namespace $(NAMESPACE)
MANIFESTS   = k8s/$(if $(OVERLAY),overlays/$(OVERLAY),base)
# the manifests, with the images of IMAGE
RENDER      = $(KUBECTL) kustomize $(MANIFESTS) | \
              sed -E 's|image: cifar-residual-job(-tensorboard)?:.*|image: $(IMAGE_NAME)\1:$(IMAGE_TAG)|'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo data run tensorboard experiment keep-results test test-slow test-browser test-all bench check format lock check-lock clean
.PHONY: docker-build docker-run docker-tensorboard docker-push test-container
.PHONY: k8s-validate k8s-apply k8s-status k8s-logs k8s-tensorboard k8s-rerun k8s-delete

##@ Start here
help: ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## train both networks on the embedded sample and compare them (one to three minutes)
	$(JOB) train --model resnet --data sample --output "$(RUNS)/demo" $(DEMO_ARGS)
	$(JOB) train --model plainnet --data sample --output "$(RUNS)/demo" $(DEMO_ARGS)
	$(JOB) compare "$(RUNS)/demo" --report "$(RUNS)/demo/report"

##@ The real thing
data: $(READY) ## download CIFAR-10 into DATA and verify every file
	$(JOB) data fetch --to "$(DATA)" $(ARGS)

run: $(READY) ## train MODEL=resnet or MODEL=plainnet [DATA= RUNS= ARGS="--epochs 2 ..."]
	@test -n "$(MODEL)" || { echo "MODEL must be resnet or plainnet, but it is empty; example: make run MODEL=resnet" >&2; exit 2; }
	exec env JOB_DATA="$(or $(RUN_DATA),$(DATA))" JOB_OUTPUT="$(or $(RUN_OUTPUT),$(RUNS))" $(JOB) train --model $(MODEL) $(ARGS)

# TensorBoard opens on the first of its pages; the address that it prints is made to open on ours, unsmoothed.
tensorboard: SHELL := bash
tensorboard: .SHELLFLAGS := -o pipefail -c
tensorboard: $(READY) ## show the runs of RUNS in a browser, both networks in one chart [PORT=6006]
	@echo "TensorBoard reads $(RUNS); in a few seconds it names the address to open."
	@TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/tensorboard --logdir "$(RUNS)" --port $(PORT) $(ARGS) 2>&1 | \
		sed -u 's|\(http://[^ ]*/\) (Press|\1#custom_scalars\&_smoothingWeight=0 (Press|'

experiment: $(READY) ## train what is missing of the paired experiment (many hours on two cores), and compare [EXPERIMENT= EPOCHS= SEEDS= PRECISION=float32]
	$(foreach seed,$(SEEDS),$(foreach blocks,$(SHAPES),$(call TWINS,--blocks $(blocks) --filters $(FILTERS) --seed $(seed) --epochs $(or $(EPOCHS),10))))
	$(call TWINS,$(ARTICLE) --seed 0 --epochs $(or $(EPOCHS),3))
	$(JOB) compare "$(EXPERIMENT)" --report "$(EXPERIMENT)/report"

##@ Containers
docker-build: ## build the images for training and for TensorBoard [IMAGE= BUILD_ARGS= DOCKER=podman]
	$(BUILD) --tag $(JOB_IMAGE) .
	$(BUILD) --target tensorboard --tag $(BOARD_IMAGE) .

docker-run: ## train MODEL=resnet or MODEL=plainnet in a container [DATA= OUTPUT=gs://... EPOCHS= ARGS=]
	@test -n "$(MODEL)" || { echo "MODEL must be resnet or plainnet, but it is empty; example: make docker-run MODEL=resnet" >&2; exit 2; }
	@$(DOCKER) image inspect $(JOB_IMAGE) > /dev/null 2>&1 || $(MAKE) --no-print-directory docker-build
	@$(SAY_STALE)
	@$(AS_CALLER); $(WITH_GPUS); $(WITH_DATA); $(call WITH_OUTPUT); $(WITH_CREDENTIALS); set -x; \
	$(DOCKER) run "$$@" $(DOCKER_ARGS) $(JOB_IMAGE) train --model $(MODEL) $(if $(EPOCHS),--epochs $(EPOCHS)) $(ARGS)

docker-tensorboard: ## show the runs of OUTPUT (a folder or gs://...) at localhost:6006 [PORT=]
	@$(DOCKER) image inspect $(BOARD_IMAGE) > /dev/null 2>&1 || $(MAKE) --no-print-directory docker-build
	@$(SAY_ADDRESS)
	@$(AS_CALLER); $(call WITH_OUTPUT,:ro); $(WITH_CREDENTIALS); set -x; \
	$(DOCKER) run "$$@" --publish 127.0.0.1:$(PORT):6006 $(DOCKER_ARGS) $(BOARD_IMAGE) \
		--logdir $(if $(filter gs://%,$(OUTPUT)),$(OUTPUT),/runs) $(ARGS)

docker-push: ## build both images and push them to IMAGE=registry/name[:tag]
	@test -n "$(findstring /,$(IMAGE))" || { echo "IMAGE must name a registry, but is \"$(IMAGE)\"; example: make docker-push IMAGE=registry.example/team/cifar-residual-job" >&2; exit 2; }
	$(MAKE) --no-print-directory docker-build
	$(DOCKER) push $(JOB_IMAGE)
	$(DOCKER) push $(BOARD_IMAGE)

test-container: $(READY) ## build both images and run them and the pods for real, as root [ARGS="-m gpu_image"]
	tests/container/prepare
	$(PYTEST) tests/container -m "container and not gpu_image" $(ARGS)
	$(PYTEST) tests/k8s -m container

##@ Kubernetes
k8s-validate: $(READY) ## render every overlay and check it against the oldest and newest Kubernetes
	@for folder in k8s/base k8s/overlays/*; do \
		$(BIN)/kubectl kustomize $$folder > $(VENV)/rendered.yaml || exit; \
		for version in $(KUBERNETES); do \
			$(BIN)/kubernetes-validate --strict --quiet -k $$version $(VENV)/rendered.yaml || exit; \
			echo "$$folder is valid for Kubernetes $$version"; \
		done; \
	done

k8s-apply: ## start everything, or what has changed [OVERLAY=cpu IMAGE=registry/cifar-residual-job]
	@$(CHECK_MANIFESTS)
	$(RENDER) | $(KUBECTL) apply -f -

k8s-status: ## show the Jobs, their pods and what they use
	$(CLUSTER) get jobs,pods,deployments,persistentvolumeclaims -o wide

k8s-logs: ## print the logs of all pods of MODEL=resnet or MODEL=plainnet [ARGS=--follow]
	@test -n "$(MODEL)" || { echo "MODEL must be resnet or plainnet, but it is empty; example: make k8s-logs MODEL=resnet" >&2; exit 2; }
	$(if $(filter -f --follow,$(ARGS)),@$(WAIT_FOR_TRAINING))
	$(CLUSTER) logs -l $(TRAINING),app.kubernetes.io/name=$(MODEL) \
		--all-containers --prefix --ignore-errors --tail=-1 --max-log-requests=100 $(ARGS)

k8s-tensorboard: ## show the cluster's runs at localhost:6006, also when all Jobs have ended [PORT=]
	@if test -z "$$($(CLUSTER) get deployment tensorboard -o 'jsonpath={.status.availableReplicas}')" && \
		! $(CLUSTER) get jobs -l $(TRAINING) -o 'jsonpath=$(JOB_ENDS)' | grep -q '=$$'; then \
		echo "All Jobs have ended, so TensorBoard has no pod to be beside: it may start anywhere, until the next k8s-apply."; \
		$(CLUSTER) patch deployment tensorboard --type=merge -p '{"spec":{"template":{"spec":{"affinity":null}}}}'; \
	fi
	$(CLUSTER) rollout status deployment/tensorboard --timeout=5m
	@$(SAY_ADDRESS)
	$(CLUSTER) port-forward service/tensorboard $(PORT):6006

k8s-rerun: ## make the Jobs again, for changed settings; finished runs stay [OVERLAY= IMAGE=]
	@$(CHECK_MANIFESTS)
	$(CLUSTER) delete jobs,pods -l $(OURS) --cascade=foreground --ignore-not-found
	$(RENDER) | $(KUBECTL) apply -f -

k8s-delete: ## delete everything but the volume with data and runs [ALL=1: that too, for ever]
ifeq ($(ALL),1)
	$(KUBECTL) delete namespace $(NAMESPACE) --ignore-not-found
else
	$(CLUSTER) delete jobs,deployments,services,networkpolicies,configmaps,serviceaccounts -l $(OURS) --ignore-not-found
endif

##@ Development
test: $(READY) ## the fast tests, without a network (a few minutes) [ARGS="-k name"]
	$(PYTEST) $(TOGETHER) -m "not (slow or network or container or browser)" $(ARGS)

test-slow: $(READY) ## the slow tests, and those that download
	$(PYTEST) $(TOGETHER) -m "(slow or network) and not (container or browser or alone)" $(ARGS)
	@test ! -f build/signal-times.txt || cat build/signal-times.txt
	$(if $(ARGS),,$(PYTEST) -m alone)

test-browser: $(READY) ## TensorBoard in a real browser; screenshots go to build/screenshots
	tests/browser/prepare
	$(PYTEST) tests/browser $(ARGS)

test-all: $(READY) ## every test, containers and browser included
	$(PYTEST) $(ARGS)

bench: $(READY) ## this job beside Keras's fit, in turns, on a quiet machine [TORCH=1: and PyTorch; ARGS="--workload small"]
	@if test "$(TORCH)" = 1; then $(BENCH_TORCH); fi
	$(BIN)/python -m tests.benchmarks $(if $(filter-out 1,$(TORCH)),--torch $(TORCH)) $(ARGS)

check: $(READY) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

keep-results: $(READY) ## keep the finished runs of EXPERIMENT in .github/experiment and README.md
	$(BIN)/python -m tests.tools.keep_results "$(EXPERIMENT)"

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

# PyTorch, in an environment of its own beside the job's packages: several GB.
define BENCH_TORCH
test -d $(VENV)/torch || $(BIN)/python -m venv $(VENV)/torch; \
$(VENV)/torch/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
	-r tests/benchmarks/requirements-torch.lock
endef

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

# A run of the experiment as a line of its recipe: one that is finished says so, one that is not goes on.
# exec, here and in `run`: make passes a SIGTERM on to the shell, which would not pass it on to the job.
define TRAIN

	exec env JOB_DATA="$(DATA)" $(JOB) train --output "$(EXPERIMENT)" --precision $(PRECISION) --commit-every 5min $(1) $(ARGS)
endef

# TensorBoard itself names the address of its first page only, and in a container another port.
define SAY_ADDRESS
echo "Both networks in one chart, in a few seconds: http://localhost:$(PORT)/#custom_scalars&_smoothingWeight=0"
endef

define CHECK_MANIFESTS
test -d $(MANIFESTS) || { echo "OVERLAY must be one of: $(notdir $(wildcard k8s/overlays/*)); not $(OVERLAY)" >&2; exit 2; }
endef

# A line a Job: its name, and True where it is complete or has failed.
JOB_ENDS = {range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Complete")].status}{.status.conditions[?(@.type=="Failed")].status}{"\n"}{end}

# `kubectl logs --follow` shows what has started and waits for nothing.
define WAIT_FOR_TRAINING
states() { $(CLUSTER) get pods -l $(TRAINING),app.kubernetes.io/name=$(MODEL) \
	-o 'jsonpath={.items[*].status.phase}{.items[*].status.containerStatuses[*].state}'; }; \
said=; \
while found="$$(states)" || exit; ! echo "$$found" | grep -qE 'Failed|Succeeded|running|terminated'; do \
	test -n "$$said" || echo "$(MODEL) does not train yet: make k8s-status says why, make k8s-logs MODEL=$(MODEL) shows a download."; \
	said=yes; sleep 2; \
done
endef

# An image keeps the code that it was built from, until somebody builds it again.
define SAY_STALE
built="$$($(DOCKER) image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' $(JOB_IMAGE))"; \
here="$$(git rev-parse HEAD 2>/dev/null)" || here="$$built"; \
test "$$built" = "$$here" || echo "$(JOB_IMAGE) was built from commit $$built; this is $$here: make docker-build renews it."
endef

# What a container gets, as options of `run` in the shell's "$$@".
# Files belong to the caller; rootless Docker calls the caller root. Nothing else may be written to but /tmp.
define AS_CALLER
set -- --rm --read-only --tmpfs /tmp:mode=1777 --cap-drop ALL --security-opt no-new-privileges \
	--security-opt label=disable --stop-timeout 15 --user "$$(id -u):$$(id -g)"; \
podman=; case "$$($(DOCKER) --version 2>&1)" in *podman*) podman=yes ;; esac; \
if test -n "$$podman"; then \
	test "$$(id -u)" = 0 || set -- "$$@" --userns keep-id; \
else \
	case "$$($(DOCKER) info --format '{{.SecurityOptions}}' 2>&1)" in *rootless*) set -- "$$@" --user 0:0 ;; esac; \
fi; \
if test -t 1; then set -- "$$@" --tty; fi
endef
define WITH_GPUS
if nvidia-smi --list-gpus > /dev/null 2>&1; then \
	if test -n "$$podman"; then set -- "$$@" --device nvidia.com/gpu=all; else set -- "$$@" --gpus all; fi; \
	set -- "$$@" --shm-size 1g; \
else \
	echo "This host has no NVIDIA GPU that works (nvidia-smi finds none), so the CPU trains."; \
fi
endef
define WITH_DATA
case "$(DATA)" in \
	sample | gs://*) set -- "$$@" --env "JOB_DATA=$(DATA)" ;; \
	*.tar.gz | *.tgz) set -- "$$@" --env JOB_DATA=/data.tar.gz --volume "$$(realpath "$(DATA)"):/data.tar.gz:ro" ;; \
	*) mkdir -p "$(DATA)"; set -- "$$@" --volume "$$(realpath "$(DATA)"):/data" ;; \
esac
endef
define WITH_OUTPUT
case "$(OUTPUT)" in \
	gs://*) set -- "$$@" --env "JOB_OUTPUT=$(OUTPUT)" ;; \
	*) mkdir -p "$(OUTPUT)"; set -- "$$@" --volume "$$(realpath "$(OUTPUT)"):/runs$(1)" ;; \
esac
endef
define WITH_CREDENTIALS
case "$(OUTPUT) $(DATA)" in *gs://*) \
	key="$${GOOGLE_APPLICATION_CREDENTIALS:-$${CLOUDSDK_CONFIG:-$$HOME/.config/gcloud}/application_default_credentials.json}"; \
	if test -r "$$key"; then \
		set -- "$$@" --volume "$$(realpath "$$key"):/run/secrets/google.json:ro" --env GOOGLE_CLOUD_PROJECT \
			--env GOOGLE_APPLICATION_CREDENTIALS=/run/secrets/google.json; \
	else \
		echo "There are no Application Default Credentials at $$key: Google's metadata server must give some."; \
		echo "Elsewhere: gcloud auth application-default login"; \
	fi ;; \
esac
endef
