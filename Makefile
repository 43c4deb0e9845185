# Every target installs what it needs. Overrides go on the command line: make demo DATA=cifar10 PORT=8333
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# The first interpreter that runs and is new enough; PYTHON=/path/to/python3.12 selects another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
BIN := .venv/bin
INSTALLED := .venv/installed
# Tests wait for the store and for processes a third of their time: one job more than CI has cores.
JOBS ?= 3
# Tests start some two hundred processes, which should not compile the same modules again.
FOR_TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
ARGS ?=
KIND ?= stable-diffusion ddpm
BENCHMARKS ?= mask masked_step masked_epoch loading attack

.PHONY: help setup demo demo-diffusion test test-fast test-kernels check lint types in-step audit sizes generated docs bench bench-scale calibrate reliability image manifests clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Install everything into .venv, once

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed and was not found." \
		"Install it (Debian: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x "$$(command -v $(PYTHON))" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: PYTHON=$(PYTHON) is not a Python of 3.11 or newer"; exit 1; }
	@echo "Installing into .venv; the first time takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[kfp,local,diffusion,dev]'
	@touch $@

demo: setup ## Run the demo: S3, training, deletion requests, sweeps, certificates, report (DATA=, PORT=)
	@$(BIN)/python -m examples.demo $(if $(DATA),--data '$(DATA)') $(if $(PORT),--port '$(PORT)')

demo-diffusion: setup ## Run the demo for diffusion models; ten minutes each (KIND=ddpm for one)
	@.ci/datasets --require
	@set -e; for kind in $(KIND); do $(BIN)/python -m examples.demo --diffusion --kind $$kind --work-dir .salun/demo-$$kind; done

test: setup ## Run all tests but those of reliability (JOBS=3 processes; ARGS='-k mask' goes to pytest)
	$(FOR_TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore=tests/reliability $(ARGS)

test-fast: setup ## Run the unit tests that need no server and no long computation (ARGS= goes to pytest)
	$(FOR_TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -m "not s3 and not e2e and not slow" \
		tests/unit tests/lab tests/properties $(ARGS)

test-kernels: setup ## Run the tests of what torch computes with its plainest kernels, as on another processor
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(FOR_TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q \
		tests/unit/test_gate.py tests/unit/test_gate_levels.py tests/unit/test_api.py tests/unit/evaluation \
		tests/unit/saliency tests/unit/methods/classification $(ARGS)

check: lint types docs in-step ## Format, lint, types, layers, generated files, and the documentation site (-j2: two at a time)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

in-step: setup
	$(BIN)/python -m pipelines compile --check
	$(BIN)/python .ci/generated.py --check
	$(BIN)/python .ci/sizes.py --check
	$(BIN)/python -m lab.studies.readme_tables --check
	$(BIN)/python -m lab.studies.adaptive --check
	$(BIN)/python -m lab.studies.deviations --render-only --check
	$(BIN)/salun bench render --into docs/research/results.md --check

audit: setup ## Check the installed packages for known vulnerabilities (ARGS='--ignore-vuln ID')
	@$(BIN)/python .ci/audit $(ARGS)

sizes: setup ## Print lines, code and modules of each package; `make check` lets them only fall (ARGS=--write)
	@$(BIN)/python .ci/sizes.py $(ARGS)

generated: setup ## Rewrite the generated files: compiled pipelines, references, schemas, component READMEs
	$(BIN)/python -m pipelines compile
	$(BIN)/python .ci/generated.py
	$(BIN)/python -m lab.studies.readme_tables
	$(BIN)/python -m lab.studies.deviations --render-only
	$(BIN)/salun bench render --into docs/research/results.md

docs: setup ## Build the documentation site into build/site; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

bench: setup ## Compare the speed of mask, step, epoch, loading and attack with the usual procedure (BENCHMARKS= selects others)
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python -m lab.studies.$$script; done

bench-scale: setup ## Measure every step by the number of rows, up to a million; an hour (ARGS='--sizes 10000' measures less)
	$(BIN)/python -m lab.studies.scale --write $(ARGS)

calibrate: setup ## Measure how often the gate is right, and write docs/research/calibration.md; minutes (ARGS= goes to it)
	$(BIN)/salun calibrate --workers 2 --results lab/results/calibration.json --into docs/research/calibration.md $(ARGS)

reliability: setup ## Nightly: test and measure kills, lost replies, late workers; write docs/research/reliability.md (ARGS=)
	$(FOR_TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q tests/reliability
	@$(BIN)/python -m tests.reliability $(ARGS)

manifests: setup ## Check manifests/: schemas, kubectl, the restricted profile, the documented commands
	$(BIN)/python -m pytest tests/manifests $(ARGS)

image: setup ## Build the container image, run both pipelines in it, test the manifests
	.ci/image

clean: ## Remove .venv and everything that was generated here
	rm -rf .venv .salun build dist *.egg-info local_outputs lab/out \
		.pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
