# onefold: `make` lists the targets. Everything is installed into .venv; nothing else is touched.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -qq install
SAY    := @printf '\n==> %s\n'

# A stamp says "installed since pyproject.toml last changed". It is written last, so an interrupted
# installation is simply run again.
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP  := $(VENV)/.installed-dev

# An environment that cannot run pip (an interrupted `make`, a removed interpreter) or that was moved
# with its folder is built again, and so is all that stands on it.
HEALTHY := $(shell $(PY) -c 'import pip._internal, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
             && grep -qsF "$(CURDIR)/$(VENV)" $(VENV)/bin/activate && echo yes)
ifneq ($(HEALTHY),yes)
.PHONY: $(PY) $(DEMO_STAMP) $(DEV_STAMP)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint types tests nightly docs package clean

help:  ## list the targets
	@echo "onefold: one network, one training run, one sampling step"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_STAMP)  ## one run on the digits, sampled in one step and in 50, evaluated; pictures in demo/
	$(SAY) "Demo: train, sample and evaluate on the digits"
	@$(VENV)/bin/onefold demo --out demo

test: lint types tests docs  ## all the checks: lint, types, tests, docs
	$(SAY) "All checks passed"

lint: $(DEV_STAMP)  ## style and formatting (ruff)
	$(SAY) "Lint: ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(DEV_STAMP)  ## static types (basedpyright)
	$(SAY) "Types: basedpyright"
	@$(PY) -m basedpyright --pythonpath $(PY)

tests: $(DEV_STAMP)  ## the tests alone (pytest)
	$(SAY) "Tests: pytest"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q --numprocesses auto --dist worksteal

nightly: $(DEV_STAMP)  ## what takes longer: 10,000 damaged inputs, 50 killed trainings
	$(SAY) "Nightly: damaged inputs and killed trainings"
	@ONEFOLD_NIGHTLY=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q --timeout 3600 --numprocesses auto tests/test_fuzz.py tests/test_faults.py

docs: $(DEV_STAMP)  ## build the documentation into site/
	$(SAY) "Docs: mkdocs"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "built: site/index.html"

package: $(DEV_STAMP)  ## wheel and source distribution in dist/; tests/test_package.py installs them elsewhere
	$(SAY) "Package: hatchling"
	@rm -rf dist
	@$(PY) -m hatchling build --directory dist

clean:  ## remove what make made: .venv, demo, site, caches; never runs/
	rm -rf $(VENV) demo site dist .pytest_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	$(SAY) "Environment: $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is not Python 3.11 or newer; install one and name it, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) >/dev/null || { \
	  echo "error: '$(PYTHON) -m venv' failed; install its venv module (Debian, Ubuntu: apt install python3-venv) and repeat" >&2; exit 2; }

$(DEMO_STAMP): pyproject.toml | $(PY)
	$(SAY) "Install: onefold (the first time takes minutes: PyTorch is large)"
	@$(PIP) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml | $(PY)
	$(SAY) "Install: onefold and its checks (the first time takes minutes: PyTorch is large)"
	@$(PIP) -e '.[dev]'
	@touch $(DEMO_STAMP) $@
