# What a person does with this project, one command each. `make` alone lists them.

# What is typed behind a target, as in `make run MODL=resnet`, must be a variable that the target knows: these here,
# and of another target any that is read below.
TRAINS            := MODEL EPOCHS DATA RUNS OUTPUT ARGS
MACHINE           := VENV PYTHON PYTHONS
KNOWN_demo        := DEMO DEMO_ARGS $(MACHINE)
KNOWN_data        := DATA ARGS $(MACHINE)
KNOWN_run         := $(TRAINS) $(MACHINE)
KNOWN_experiment  := $(TRAINS) EXPERIMENT SHAPES FILTERS SEEDS ARTICLE PRECISION $(MACHINE)
KNOWN_docker-run  := $(TRAINS) IMAGE BUILD_ARGS PLATFORM DOCKER DOCKER_ARGS $(MACHINE)
READ_BELOW         = $(shell grep -oE '[$$][(][A-Z_]+[)]|^[A-Z_]+' $(firstword $(MAKEFILE_LIST)) | tr -d '$$()' | sort -u)
TYPED             := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
ifneq ($(TYPED),)
KNOWN   := $(foreach goal,$(or $(MAKECMDGOALS),help),$(or $(KNOWN_$(goal)),$(READ_BELOW)))
UNKNOWN := $(filter-out $(KNOWN),$(TYPED))
$(if $(UNKNOWN),$(error make $(MAKECMDGOALS) knows no $(UNKNOWN), but: $(KNOWN)))
endif
# It would hide this folder's packages from Python.
unexport PYTHONSAFEPATH

# resnet or plainnet; for `experiment` nothing means both
MODEL  ?=
EPOCHS ?=
# further options of the command, e.g. ARGS="--batch-size 64"
ARGS   ?=
DATA   ?= data
RUNS   ?= runs
# where the runs of `run` and `docker-run` go: a folder or gs://bucket/prefix
OUTPUT ?= $(RUNS)
# for `run` and `experiment`: the job's own variables, where these are not given
RUN_DATA   := $(if $(filter file,$(origin DATA)),$(JOB_DATA))
RUN_OUTPUT := $(if $(filter-out file,$(origin RUNS) $(origin OUTPUT)),,$(JOB_OUTPUT))
# the environment, and the Python to make it with (else the first suitable one of PYTHONS)
VENV   ?= .venv
# for `bench`: 1, or a Python that has PyTorch
TORCH  ?=
PYTHON ?=
# its runs: not in RUNS, where their curves would lie among the real ones
DEMO   ?= demo
# He et al.'s 20-layer shape and its plain twin: small batches, so that batch norm's moving statistics warm up
DEMO_ARGS ?= --blocks 3,3,3 --filters 16 --epochs 10 --batch-size 20

# The experiment: its runs, which shapes and seeds of them, the options of the article's twins
EXPERIMENT ?= $(or $(RUN_OUTPUT),$(OUTPUT))/experiment
SHAPES  ?= 3,3,3 9,9,9
FILTERS ?= 16
SEEDS   ?= 0 1 2
ARTICLE ?= --blocks 2,5,5,2 --filters 64
# of its computations: one for all machines, so that their runs belong together
PRECISION ?= bfloat16
TWINS    = $(foreach model,$(or $(MODEL),resnet plainnet),$(call TRAIN,--model $(model) $(1)))

PYTHONS := $(or $(PYTHON),python3.12 python3.11 python3.13 python3)
READY   := $(VENV)/.ready
BIN     := $(VENV)/bin
JOB     := $(BIN)/python -m job
PYTEST  := $(BIN)/python -m pytest
# two processes; the tests of one file stay in one
TOGETHER := -n 2 --dist loadfile
# where `lock` writes
LOCKS   ?= requirements
LOCK    := $(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --custom-compile-command "make lock"
ANY     := --universal --fork-strategy fewest --python-version 3.11
GPU     := --python-version 3.12 --python-platform x86_64-manylinux_2_39 --only-binary :all:
PLAN    := $(BIN)/uv pip install --quiet --dry-run --require-hashes --only-binary :all: \
           --python $(BIN)/python --target $(VENV)/planned

# Containers: docker or podman; the images' name, with a registry before it and a tag behind it where you want them
DOCKER      ?= docker
PORT        ?= 6006
# a tilde that the shell has left as it is
$(foreach name,DATA RUNS DEMO EXPERIMENT OUTPUT,$(eval override $(name) := $$(patsubst ~/%,$$(HOME)/%,$$($(name)))))
# of the images, e.g. linux/amd64; docker-push has that by default, as the cluster's nodes do
PLATFORM    :=
# further options of the engine's `build` and `run`
BUILD_ARGS  ?=
DOCKER_ARGS ?=
VERSION     := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
# of registry:port/name:tag@sha256:digest
DIGEST_OF    = $(word 2,$(subst @, ,$(1)))
TAG_OF       = $(or $(word 2,$(subst :, ,$(notdir $(firstword $(subst @, ,$(1)))))),$(VERSION))
NAME_OF      = $(patsubst %:$(TAG_OF),%,$(firstword $(subst @, ,$(1))))
IMAGE_NAME   = $(or $(call NAME_OF,$(IMAGE)),cifar-residual-job)
IMAGE_TAG    = $(call TAG_OF,$(IMAGE))
JOB_IMAGE    = $(IMAGE_NAME)$(if $(call DIGEST_OF,$(IMAGE)),@$(call DIGEST_OF,$(IMAGE)),:$(IMAGE_TAG))
# follows the job's name and tag; a digest of its own needs BOARD_IMAGE=name@sha256:...
BOARD_IMAGE ?= $(IMAGE_NAME)-tensorboard:$(IMAGE_TAG)
BUILD        = $(DOCKER) build $(if $(PLATFORM),--platform $(PLATFORM)) --build-arg VERSION=$(VERSION) $(BUILD_ARGS) \
               --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) \
               --build-arg CREATED=$(shell git log -1 --format=%cI 2>/dev/null || echo unknown)

# Kubernetes: what k8s-validate checks against, the oldest and the newest version that will do
KUBERNETES := 1.31 1.37
# typed, or these: a NAMESPACE or ALL of the environment is meant for other programs
NAMESPACE  := cifar-residual-job
OURS       := app.kubernetes.io/part-of=cifar-residual-job
TRAINING   := app.kubernetes.io/component=training
DATA_JOB   := app.kubernetes.io/component=data
OVERLAY    ?=
ALL        :=
# the cluster, as kubectl's configuration names it; else its current one
CONTEXT    ?=
# where k8s-fetch puts the runs
TO         ?= cluster-runs
# the user's own kubectl, which knows the way into their cluster, else the environment's
KUBECTL    ?= $(or $(shell command -v kubectl),$(BIN)/kubectl)
SERVER      = $(KUBECTL) $(if $(CONTEXT),--context $(CONTEXT))
CLUSTER     = $(SERVER) --namespace $(NAMESPACE)
MANIFESTS   = k8s/$(if $(OVERLAY),overlays/$(OVERLAY),base)
# the manifests with the images of IMAGE, as RENDER has left them
RENDERED   := build/k8s/rendered.yaml
# for the programs of k8s/bin, and for k8s-validate where there is no environment yet
HOST_PYTHON := $(or $(PYTHON),python3)
VALIDATE   := $(if $(wildcard $(READY)),$(BIN),build/validate/bin)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo data run tensorboard experiment keep-results test test-slow test-browser test-gpu test-all bench check format lock check-lock docs clean
.PHONY: docker-build docker-run docker-tensorboard docker-push test-container
.PHONY: k8s-validate k8s-render k8s-apply k8s-status k8s-logs k8s-tensorboard k8s-fetch k8s-rerun k8s-delete test-cluster

##@ Start here
help: ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## train both networks on the embedded sample and compare them (one to three minutes) [DEMO=folder]
	$(JOB) train --model resnet --data sample --output "$(DEMO)" $(DEMO_ARGS)
	$(JOB) train --model plainnet --data sample --output "$(DEMO)" $(DEMO_ARGS)
	$(JOB) compare "$(DEMO)" --report "$(DEMO)/report"
	@echo "Curves: make tensorboard RUNS=$(DEMO). One pair on a thousand images cannot show which network is better: that takes all 50,000, several seeds and deeper networks (make data, make experiment)."

##@ The real thing
data: $(READY) ## download CIFAR-10 into DATA and verify every file
	$(JOB) data fetch --to "$(DATA)" $(ARGS)

run: $(READY) ## train MODEL=resnet or MODEL=plainnet [EPOCHS= DATA= OUTPUT=gs://... ARGS=]
	@test -n "$(MODEL)" || { echo "MODEL must be resnet or plainnet, but it is empty; example: make run MODEL=resnet" >&2; exit 2; }
	exec env JOB_DATA="$(or $(RUN_DATA),$(DATA))" JOB_OUTPUT="$(or $(RUN_OUTPUT),$(OUTPUT))" $(JOB) train --model $(MODEL) $(if $(EPOCHS),--epochs $(EPOCHS)) $(ARGS)

tensorboard: $(READY) ## show the runs of RUNS (a folder or gs://...) in a browser, both networks in one chart [PORT=6006]
	@case "$(RUNS)" in gs://*) ;; *) test -d "$(RUNS)" || { \
		echo "RUNS must be a folder of runs or gs://..., but there is no $(RUNS); example: make tensorboard RUNS=runs" >&2; exit 2; } ;; \
	esac
	@echo "TensorBoard reads $(RUNS); in a few seconds it names the address to open."
	@$(SAY_OUTLIERS)
	@exec $(BIN)/python -c '$(TENSORBOARD)' --logdir "$(RUNS)" --port $(PORT) $(ARGS)

experiment: $(READY) ## train what is missing of the paired experiment (many hours on two cores), and compare [EXPERIMENT= MODEL= EPOCHS= SEEDS= PRECISION=float32]
	$(foreach seed,$(SEEDS),$(foreach blocks,$(SHAPES),$(call TWINS,--blocks $(blocks) --filters $(FILTERS) --seed $(seed) --epochs $(or $(EPOCHS),10))))
	$(call TWINS,$(ARTICLE) --seed 0 --epochs $(or $(EPOCHS),3))
	$(JOB) compare "$(EXPERIMENT)" --report "$(if $(filter gs://%,$(EXPERIMENT)),report,$(EXPERIMENT)/report)"

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

docker-push: ## build both images for x86-64 and push them to IMAGE=registry/name[:tag] [PLATFORM=]
	@test -n "$(findstring /,$(IMAGE))" || { echo "IMAGE must name a registry, but is \"$(IMAGE)\"; example: make docker-push IMAGE=registry.example/team/cifar-residual-job" >&2; exit 2; }
	$(MAKE) --no-print-directory docker-build PLATFORM=$(or $(PLATFORM),linux/amd64)
	$(DOCKER) push $(JOB_IMAGE)
	$(DOCKER) push $(BOARD_IMAGE)

test-container: $(READY) ## build both images and run them and the pods for real, as root [ARGS="-m gpu_image"]
	tests/container/prepare
	$(PYTEST) tests/container -m "container and not gpu_image" $(ARGS)
	$(PYTEST) tests/k8s -m container

##@ Kubernetes
k8s-validate: $(VALIDATE)/kubernetes-validate ## render every overlay and check it against the oldest and newest Kubernetes
	@mkdir -p $(dir $(RENDERED))
	@for folder in k8s/base k8s/overlays/*; do \
		$(VALIDATE)/kubectl kustomize $$folder > $(RENDERED) || exit; \
		for version in $(KUBERNETES); do \
			$(VALIDATE)/kubernetes-validate --strict --quiet -k $$version $(RENDERED) || exit; \
			echo "$$folder is valid for Kubernetes $$version"; \
		done; \
	done

k8s-render: ## print the manifests that k8s-apply sends [OVERLAY= IMAGE= BOARD_IMAGE=]
	@$(RENDER)
	@cat $(RENDERED)

k8s-apply: ## start everything [OVERLAY=cpu IMAGE=registry/cifar-residual-job CONTEXT=]
	@$(RENDER)
	@$(REFUSE_CHANGES)
	@$(APPLY)

k8s-status: ## show what runs, what waits and why, in one table
	@$(CLUSTER) get jobs,pods,persistentvolumeclaims,events -o json | $(HOST_PYTHON) k8s/bin/status.py

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

k8s-fetch: ## copy the runs of the cluster's volume here and compare checksums, also while Jobs run [TO=cluster-runs IMAGE=]
	@$(HOST_PYTHON) k8s/bin/fetch.py "$(TO)" --image $(BOARD_IMAGE) -- $(CLUSTER)

k8s-rerun: ## make everything again, for changed settings, images or overlays; finished runs stay [OVERLAY= IMAGE=]
	@$(RENDER)
	$(CLUSTER) delete jobs,deployments,configmaps -l $(OURS) --cascade=foreground --ignore-not-found
	@$(APPLY)

k8s-delete: ## delete everything but the volume with data and runs [ALL=1: that too, for ever]
ifeq ($(ALL),1)
	$(SERVER) delete namespaces -l $(OURS) --field-selector metadata.name=$(NAMESPACE) --ignore-not-found
else
	$(CLUSTER) delete jobs,deployments,services,networkpolicies,configmaps,serviceaccounts -l $(OURS) --ignore-not-found
endif

test-cluster: $(if $(CONTEXT),$(READY)) ## run the Jobs' promises on the cluster CONTEXT=, in a namespace of their own [IMAGE= ARGS="--only evict"]
	@test -n "$(CONTEXT)" || { echo "CONTEXT must name a cluster of: kubectl config get-contexts; example: make test-cluster CONTEXT=kind-kind" >&2; exit 2; }
	$(BIN)/python -m tests.cluster --context "$(CONTEXT)" $(if $(IMAGE),--image "$(IMAGE)") $(ARGS)

##@ Development
test: $(READY) ## the fast tests, without a network (a few minutes) [ARGS="-k name"]
	$(PYTEST) $(TOGETHER) -m "not (slow or network or container or browser or gpu)" $(ARGS)

test-slow: $(READY) ## the slow tests, and those that download
	$(PYTEST) $(TOGETHER) -m "(slow or network) and not (container or browser or gpu or alone)" $(ARGS)
	@test ! -f build/signal-times.txt || cat build/signal-times.txt
	$(if $(ARGS),,$(PYTEST) -m "alone and not gpu")

test-browser: $(READY) ## TensorBoard in a real browser; screenshots go to build/screenshots
	tests/browser/prepare
	$(PYTEST) tests/browser $(ARGS)

test-gpu: $(READY) ## what one NVIDIA GPU can show, in ten minutes; images/s and memory go to build/gpu-report.json
	@rm -f build/gpu-report.json
	$(PYTEST) tests/gpu -m gpu $(ARGS)

test-all: $(READY) ## every test, containers and browser included, but for those that need a GPU
	$(PYTEST) -m "not gpu" $(ARGS)

bench: $(READY) ## this job beside Keras's fit, in turns, on a quiet machine [TORCH=1: and PyTorch; ARGS="--workload small"]
	@if test "$(TORCH)" = 1; then $(BENCH_TORCH); fi
	$(BIN)/python -m tests.benchmarks $(if $(filter-out 1,$(TORCH)),--torch $(TORCH)) $(ARGS)

check: $(READY) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY) ## write the tables of docs/reference.md from the program
	$(BIN)/python -m tests.tools.write_reference

keep-results: $(READY) ## keep the finished runs of EXPERIMENT in docs/experiment, and renew the pages and figures about them
	$(BIN)/python -m tests.tools.keep_results "$(EXPERIMENT)"

format: $(READY) ## format the code and mend what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: $(READY) ## make the lock files again from pyproject.toml [ARGS=--upgrade]
	$(LOCK) $(ANY) $(ARGS) pyproject.toml --extra plots --group dev -o $(LOCKS)/dev.lock
	$(LOCK) $(ANY) $(ARGS) pyproject.toml -c $(LOCKS)/dev.lock -o $(LOCKS)/cpu.lock
	$(LOCK) $(GPU) $(ARGS) pyproject.toml --extra gpu -c $(LOCKS)/dev.lock -o $(LOCKS)/gpu.lock
	$(LOCK) $(ANY) $(ARGS) --group tensorboard -c $(LOCKS)/dev.lock -o $(LOCKS)/tensorboard.lock
	$(LOCK) $(ANY) $(ARGS) --group manifests -c $(LOCKS)/dev.lock -o $(LOCKS)/manifests.lock

check-lock: $(READY) ## plan the install of every lock on every platform it serves, downloading no package
	$(PLAN) $(GPU) -r requirements/gpu.lock
	for python in 3.11 3.12 3.13; do for lock in dev cpu tensorboard manifests; do \
		$(PLAN) --python-version $$python --python-platform x86_64-manylinux_2_36 -r requirements/$$lock.lock || exit; \
	done; done

clean: ## remove the environment, caches and build output; runs, demo and data stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find job tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, made the first time it is needed and completed when the lock changes. A Python suits when it
# runs at all (a version manager's shim may not), has the right version and can make environments.
$(READY): requirements/dev.lock pyproject.toml
	@if ! $(BIN)/python -c '$(SUITS)' 2>/dev/null; then \
		suitable=; \
		for python in $(PYTHONS); do \
			if "$$python" -c '$(SUITS)' 2>/dev/null; then suitable=$$python; break; fi; \
		done; \
		if test -z "$$suitable"; then $(NO_PYTHON); exit 1; fi; \
		echo "Making $(VENV) with $$("$$suitable" --version): once, about two minutes."; \
		"$$suitable" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r requirements/dev.lock
	@touch $@

# PyTorch, in an environment of its own beside the job's packages: several GB.
define BENCH_TORCH
test -d $(VENV)/torch || $(BIN)/python -m venv $(VENV)/torch; \
$(VENV)/torch/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
	-r tests/benchmarks/requirements-torch.lock
endef

SUITS = import ensurepip, sys, venv; sys.exit(sys.platform != "linux" or not (3, 11) <= sys.version_info[:2] <= (3, 13))
define NO_PYTHON
{ \
	echo "TensorFlow 2.21 and this job need Linux on x86-64 and Python 3.11, 3.12 or 3.13"; \
	echo "with its venv module (Debian and Ubuntu: apt-get install python3-venv). What was found does not do:"; \
	for python in $(PYTHONS); do \
		echo "  $$python: $$("$$python" --version 2>/dev/null || echo not installed)"; \
	done; \
	echo "Install one, or name one: make PYTHON=/path/to/python3.12 ..."; \
} >&2
endef

# A run of the experiment as a line of its recipe: one that is finished says so, one that is not goes on.
# exec, here and in `run`: make passes a SIGTERM on to the shell, which would not pass it on to the job.
define TRAIN

	exec env JOB_DATA="$(or $(RUN_DATA),$(DATA))" $(JOB) train --output "$(EXPERIMENT)" --precision $(PRECISION) --commit-every 5min $(1) $(ARGS)
endef

# In a container TensorBoard names another port.
define SAY_ADDRESS
echo "Both networks in one chart, in a few seconds: http://localhost:$(PORT)/"; $(SAY_OUTLIERS)
endef
# Its own default, which it takes from the browser alone.
SAY_OUTLIERS = echo "It cuts off what it takes for outliers, as the highest curve: untick 'Ignore outliers in chart scaling' there."

# TensorBoard as in the light image, without TensorFlow: it starts sooner and looks for no GPU. fsspec reads gs://.
define TENSORBOARD
import sys, types; sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf"); \
from tensorboard.main import run_main; run_main()
endef

RENAMED = newName: "$(NAME_OF)", $(if $(DIGEST_OF),digest: "$(DIGEST_OF)",newTag: "$(TAG_OF)")
# From a kustomization that names the overlay and the images.
define RENDER
test -d $(MANIFESTS) || { echo "OVERLAY must be one of: $(notdir $(wildcard k8s/overlays/*)); not $(OVERLAY)" >&2; exit 2; }; \
mkdir -p $(dir $(RENDERED)); \
printf '%s\n' 'resources: [../../$(MANIFESTS)]' 'namespace: $(NAMESPACE)' images: \
	'  - {name: cifar-residual-job, $(call RENAMED,$(JOB_IMAGE))}' \
	'  - {name: cifar-residual-job-tensorboard, $(call RENAMED,$(BOARD_IMAGE))}' \
	> $(dir $(RENDERED))kustomization.yaml; \
$(KUBECTL) kustomize $(dir $(RENDERED)) > $(RENDERED) || exit; \
if grep -qE 'gs://BUCKET/|@PROJECT\.' $(RENDERED); then \
	echo "BUCKET and PROJECT are placeholders: write your names into k8s/components/gcs/settings.yaml" >&2; exit 2; \
fi
endef

# The server is asked first, about all of it: nothing is applied by halves. It cannot be asked before the namespace is
# there, and then nothing else is there either.
define REFUSE_CHANGES
found="$$($(SERVER) get namespace $(NAMESPACE) --ignore-not-found -o name)" || exit; \
test -z "$$found" || said="$$($(SERVER) apply --dry-run=server -f $(RENDERED) 2>&1)" || { \
	changed="$$(printf '%s\n' "$$said" | grep -oE '(Job|ConfigMap)(\.batch)? "[a-z0-9-]+" is invalid.*field is immutable' | cut -d '"' -f 2 | sort -u | xargs | sed 's/ /, /g')"; \
	if test -n "$$changed"; then \
		echo "Nothing was applied: the cluster has $$changed already, with other settings, images or another overlay, and they cannot change in place; to stop them and start these (finished runs stay): make k8s-rerun$(if $(OVERLAY), OVERLAY=$(OVERLAY))$(if $(IMAGE), IMAGE=$(IMAGE))"; \
	else \
		printf 'Nothing was applied: the cluster refuses the manifests.\n%s\n' "$$said"; \
	fi >&2; \
	exit 1; \
}
endef

# The training Jobs last. Their pods go nowhere while the data's pod has a node; were they the first to have one, they
# would fetch the data themselves, with a GPU in hand, and keep the data's pod waiting.
define APPLY
$(SERVER) apply -f $(RENDERED) -l '$(subst =,!=,$(TRAINING))' || exit; \
job="$$($(CLUSTER) get jobs -l $(DATA_JOB) -o name)" || exit; \
tries=$${job:+150}; \
while test $${tries:-0} -gt 0; do \
	placed="$$($(CLUSTER) get jobs,pods -l $(DATA_JOB) -o 'jsonpath=$(DATA_PLACED)')" || exit; \
	test -z "$$placed" || break; \
	test $$tries -ne 145 || echo "The Job data waits for a node, and training for it: make k8s-status says why."; \
	tries=$$((tries - 1)); sleep 2; \
done; \
$(SERVER) apply -f $(RENDERED)
endef
# Not empty once the data's pod has a node, or its Job has ended.
DATA_PLACED = {.items[*].spec.nodeName}{.items[*].status.conditions[?(@.type=="Complete")].status}{.items[*].status.conditions[?(@.type=="Failed")].status}

# Only the packages that check manifests.
build/validate/bin/kubernetes-validate: requirements/manifests.lock
	$(HOST_PYTHON) -m venv --clear build/validate
	build/validate/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r $<
	@touch $@

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
	*) if test -f "$(DATA)"; then \
		set -- "$$@" --env JOB_DATA=/archive --volume "$$(realpath "$(DATA)"):/archive:ro"; \
	else \
		mkdir -p "$(DATA)"; set -- "$$@" --volume "$$(realpath "$(DATA)"):/data"; \
	fi ;; \
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
