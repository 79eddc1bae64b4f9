# The project's commands; `make` lists them. Linux, python3.11.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
ORDER ?= embedded
UI_PORT ?= 5000
JOBS ?=
WORKERS ?= 2
SHARD ?=
PYTEST = -n $(WORKERS) --dist loadgroup
export PREFECT_PORT ?= 4200
export DO_NOT_TRACK := true
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help env lock run compare report ui serve stop docs test test-all bench soak audit lint clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

# Rebuilt only when the dependencies change.
$(VENV)/.ready: pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "$(PYTHON) is not Python 3.11: install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' # torch and the project
	@touch $@

env: $(VENV)/.ready ## create the environment (.venv); commands below do so if necessary

# After a change of constraints.txt: the same pins, with the hashes of all their files.
lock: env
	@test -x .cache/uv/bin/uv || { python -m venv .cache/uv && .cache/uv/bin/python -m pip install --quiet uv==0.13.8; }
	@{ echo "# constraints.txt with the SHA-256 of each version's files, by \`make lock\`; without torch: docs/security.md"; \
		grep -v '^torch==' constraints.txt | .cache/uv/bin/uv pip compile --quiet --generate-hashes --no-deps \
		--python-version 3.11.2 --no-header --no-annotate -; } > .cache/requirements.lock
	@mv .cache/requirements.lock requirements.lock

run: env ## learn the four embedded tasks (dvc repro: only what changed) and show the result
	@dvc repro embedded
	@python -m flows.publish embedded
	@echo "Curves, scores and adapters of every run:  make ui"

compare: env ## seqlora beside gainlora-inflora on the same tasks
	@gainlora compare $(ORDER) --methods seqlora,gainlora-inflora

report: env ## one HTML page over all runs
	@gainlora report

ui: env ## MLflow on http://127.0.0.1:5000 (UI_PORT=...); ends with Ctrl-C
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --host 127.0.0.1 --port $(UI_PORT) \
		--backend-store-uri sqlite:///mlruns/mlflow.db

serve: env ## Prefect server on 127.0.0.1:4200 (PREFECT_PORT=...) and its deployments, in the background (JOBS=2: two runs at once)
	@python -m flows.server start $(JOBS)

stop: env ## end the processes of `make serve`
	@python -m flows.server stop

docs: env ## the docs site: site/index.html
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict && echo "Open site/index.html"

test: env ## the tests of every change, on WORKERS=2 processes
	@python -m pytest $(PYTEST) -m "not long"

test-all: env ## these and the long ones; SHARD=2/3: the second third of the long ones alone
	@python -m pytest $(PYTEST) $(if $(SHARD),-m long --shard $(SHARD))

bench: env ## measure speed and memory against the targets: benchmarks/README.md
	@python -m benchmarks

soak: env ## kill a stream 100 times at random moments: half an hour, figures in tests/soak.json
	@python -m tests.soak

audit: env ## known vulnerabilities in the dependencies, where the advisory database answers
	@python -m tests.audit

lint: env ## ruff and mypy
	@ruff check . && ruff format --check . && mypy

clean: ## remove the environment and caches; data, models, runs and mlruns stay
	rm -rf $(VENV) site .cache .pytest_cache .mypy_cache .ruff_cache
