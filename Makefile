# make run: everything, from nothing to a promoted model. make: this list.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Of the tests: one more than the two cores for which the suite is meant, as many tests wait for servers.
PROCESSES ?= 3

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers often set it: every process would compile all it imports anew, which costs a stage five seconds or more.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install setup run ui up down study lint types test test-fast docs audit format lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## .venv with the locked dependencies

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "error: Python 3.11, 3.12 or 3.13 is needed, " + sys.executable + " is " + ".".join(map(str, v)) + "; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing the locked dependencies into $(VENV): some minutes, once"
	@$(BIN)/python -m pip install --no-compile -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

setup: $(STAMP)  ## prepare the MLflow store, check params.yaml and DVC (a run does it too)
	@$(BIN)/cm3leon setup

run: $(STAMP)  ## the whole pipeline; PROFILE=tiny writes params.yaml from configs/tiny.yaml first; ACCEPT_DRIFT=1 accepts new data
	@$(BIN)/python -m flows.pipeline $(if $(PROFILE),--profile $(PROFILE)) $(if $(filter 1,$(ACCEPT_DRIFT)),--accept-drift)

ui: $(STAMP)  ## MLflow, Prefect and Data Docs on 127.0.0.1
	@$(BIN)/cm3leon ui

up: $(STAMP)  ## MLflow, Prefect, a worker and the deployments in the background, behind a password
	@$(BIN)/cm3leon up

down: $(STAMP)  ## stop what make up has started
	@$(BIN)/cm3leon down

study: $(STAMP)  ## the paper's claims measured again, into docs/study.md; needs finished runs, RUNS="DIR ...", takes over an hour
	@$(BIN)/python -m benchmarks.study $(if $(RUNS),--runs $(RUNS))

lint: $(STAMP)  ## ruff: rules and format; the layers of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## mypy
	$(BIN)/mypy

test: lint types  ## lint, types, tests; PYTEST="-k flows" adds arguments
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST)

test-fast: $(STAMP)  ## tests for the inner loop: without slow ones, browser and GPU
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow and not browser and not gpu" $(PYTEST)

# pdoc cannot resolve the annotations of a NamedTuple in a module with postponed annotations: the one warning that is filtered.
# Without PDOC_ALLOW_EXEC it warns of every import that asks the system for the processor's name.
docs: $(STAMP)  ## API reference from the docstrings, in build/docs/index.html
	@rm -rf build/docs
	PDOC_ALLOW_EXEC=1 $(BIN)/python -W "ignore:Error parsing type annotation ForwardRef" -m pdoc --docformat google -o build/docs cm3leon

audit:  ## look the locked packages up in the databases of advisories; needs the network
	@$(PYTHON) -m venv .cache/audit
	@.cache/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	@.cache/audit/bin/python -m pip_audit --requirement requirements.lock --disable-pip --no-deps

format: $(STAMP)  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## write requirements.lock anew from pyproject.toml's ranges
	@rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet ".[dev,hf,s3]"
	@{ sed -n '/^#/p' requirements.lock; .cache/lock/bin/python -m pip freeze --exclude cm3leon \
	  | sed -E 's/^(torch|torchvision)==([^+]*)\+.*/\1==\2/' | grep -Ev '^(nvidia-|triton==|cuda-)'; } > .cache/requirements.lock
	@mv .cache/requirements.lock requirements.lock && rm -rf .cache/lock

clean:  ## caches and what tools leave; not the data, models, store, environment or the deployments' worktree
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
	if [ -d .cache ]; then find .cache -mindepth 1 -maxdepth 1 ! -name worktree ! -name run.lock -exec rm -rf {} +; fi
	find cm3leon flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
