# Every target sets up what it needs first: git, make and Python 3.11 or newer with venv are enough.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
# pip builds the few source packages with the locked setuptools, not with the newest one.
INSTALL := $(PIP) install --no-build-isolation

.PHONY: help train test check format hooks clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

train: $(VENV)/.runtime ## fine-tune, evaluate, compare, report; ARGS="precision=fp16 peft=none" are passed on
	@$(BIN)/python train.py $(ARGS)

test: check $(VENV)/.kernels ## every check and test; ARGS="-k lyapunov" are passed on to pytest
	@echo "pytest"
	@$(BIN)/python -m pytest -q -n 2 $(ARGS)

check: $(VENV)/.dev ## lint, format and types only
	@echo "ruff check, ruff format --check, mypy"
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m ruff format --quiet --check .
	@$(BIN)/python -m mypy --no-error-summary lyapft

format: $(VENV)/.dev ## lint with fixes, and format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

hooks: $(VENV)/.dev ## run the checks before every commit
	@$(BIN)/python -m pre_commit install

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lyapft needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.lock pyproject.toml lyapft/__init__.py | $(BIN)/python
	@echo "Setting up $(VENV) from requirements.lock (about 2 GB, some minutes, once)"
	@$(INSTALL) "$$(grep '^setuptools==' requirements.lock)"
	@$(INSTALL) --no-compile -r requirements.lock
	@$(INSTALL) --no-deps --editable .
	@# On every core, unlike pip. Some packages ship templates under .py names that do not compile: not an error.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo "Adding the tools of requirements-dev.lock"
	@$(INSTALL) -r requirements.lock -r requirements-dev.lock
	@touch $@

# mamba-ssm is for the tests of the CUDA path; where it cannot be had they are skipped, but not in CI.
$(VENV)/.kernels: requirements-kernels.lock $(VENV)/.dev
	@echo "Adding mamba-ssm, built without CUDA"
	@if MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(INSTALL) --no-deps -r requirements-kernels.lock; then \
	  touch $@; \
	else \
	  echo "mamba-ssm cannot be built here: tests that run its kernels will be skipped" >&2; test -z "$$CI"; \
	fi

clean: ## remove the environment and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
