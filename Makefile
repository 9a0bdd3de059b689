# make submit PRECISION=bf16 BATCH_SIZE=512      what follows a target is handed to the command of the same name
#
# This file lists no setting and holds no default. holdfast reads the words of the command line from make itself, as they
# were typed, and refuses the ones it does not know; so they are not exported, which would expand $(...) inside them.
unexport $(foreach word,$(MAKEOVERRIDES),$(if $(findstring =,$(word)),$(firstword $(subst =, ,$(word)))))
export HOLDFAST_PYTHON HOLDFAST_INSTALL_SLURM HOLDFAST_PINS HOLDFAST_LAB

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
READY := .venv/.ready
HOLDFAST := .venv/bin/holdfast
JOB_TARGETS := run render explain precision submit sweep status watch logs cancel resume rerun diff doctor drill report

# Three at a time on two cores, a file to each: most of a Slurm test is waiting.
BY_FILE := -n 3 --dist loadfile --no-loadscope-reorder

# What belongs to the project, as a list with NUL between its names.
FILES := git ls-files -z --cached --others --exclude-standard

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-slow test-gpu test-repeat coverage chaos mutation lint pins golden bench-launch clean $(JOB_TARGETS) lab lab-stop te

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+( [a-z-]+)*:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "make $(firstword $(JOB_TARGETS)) ...       also: $(wordlist 2,99,$(JOB_TARGETS)); KEY=value behind it is a setting (make explain), ARGS=\"--wait\" an option"

setup: $(READY)  ## make .venv with everything this machine needs

$(READY): pyproject.toml constraints.txt launcher/setup.sh
	@launcher/setup.sh venv

demo: $(READY)  ## train, be preempted and resume on a private real Slurm, in about two minutes
	@launcher/setup.sh slurm || true
	@$(HOLDFAST) demo $(ARGS)

test: $(READY)  ## all tests; the ones on a real Slurm wherever it can be had
	@launcher/setup.sh slurm || true
	@.venv/bin/python -m pytest $(BY_FILE) -m "not slow and not gpu" $(TESTS)

test-fast: $(READY)  ## the tests that start no Slurm and no training and load no torch: under a minute
	@.venv/bin/python -m pytest --fast -n 3 --dist worksteal $(TESTS)

test-slow: $(READY)  ## the tests that take long: more seeds, more kills, compilation
	@.venv/bin/python -m pytest -m "slow and not gpu" $(TESTS)

test-gpu: $(READY)  ## the tests that need a CUDA device
	@.venv/bin/python -m pytest -m gpu

test-repeat: $(READY)  ## all tests N times (10), then which failed how often; TESTS=tests/slurm/test_lab.py for some of them
	@env -u MAKEFLAGS .venv/bin/python -m tools.repeat $(or $(N),10) -- $(BY_FILE) -m "not slow and not gpu" $(TESTS)

coverage: $(READY)  ## all tests, and which lines and branches of jobs/ and slurm/ they reach; fails below 95 %
	@launcher/setup.sh slurm || true
	@.venv/bin/coverage erase
	@.venv/bin/coverage run -m pytest $(BY_FILE) -m "not slow and not gpu" $(TESTS)
	@.venv/bin/coverage combine --quiet
	@.venv/bin/coverage report

chaos: $(READY)  ## every fault of docs/evidence/survival.md on the lab, and regenerate that page; about half an hour
	@launcher/setup.sh slurm
	@.venv/bin/python -m tools.chaos

mutation: $(READY)  ## small mistakes in what must not be wrong, one at a time: do the tests notice? ten minutes; ARGS="jobs/config/validation.py" for one
	@.venv/bin/python -m tools.mutation $(ARGS)

lint: $(READY)  ## ruff, mypy, codespell, shellcheck
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy
	@$(FILES) | xargs -0 .venv/bin/codespell
	@command -v shellcheck >/dev/null || { echo "make lint needs shellcheck, a package of your system: apt-get install shellcheck" >&2; exit 1; }
	@$(FILES) ':!*.j2' | xargs -0 awk 'FNR == 1 && /^\043!.*sh$$/ { print FILENAME } { nextfile }' | xargs shellcheck

pins: $(READY)  ## rewrite constraints.txt with the newest versions that fit; TORCH=2.14.0 for another torch
	@env -u MAKEFLAGS .venv/bin/python -m tools.pins $(if $(TORCH),--torch $(TORCH))

golden: $(READY)  ## write golden scripts, generated pages, schema and pictures; review the diff
	@.venv/bin/python -m tools.generate_docs
	@.venv/bin/python tools/draw.py

bench-launch: $(READY)  ## time of render, submit and start, on the lab
	@launcher/setup.sh slurm || true
	@.venv/bin/python -m benchmarks.launch

te: $(READY)  ## Transformer Engine for fp8: built against the installed torch, so never by an environment file
	@.venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["te"])' \
		| xargs .venv/bin/pip install --no-build-isolation

$(JOB_TARGETS): $(READY)
	@$(HOLDFAST) $@ $(ARGS)

lab: $(READY)  ## boot the private Slurm cluster
	@launcher/setup.sh slurm
	@$(HOLDFAST) lab start

lab-stop: $(READY)  ## stop it
	@$(HOLDFAST) lab stop

clean:  ## remove caches (never runs)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* build dist
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
