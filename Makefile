# `make demo` and `make test` each do all the set-up that they need, once: a virtual environment
# in .venv with the versions of constraints.txt. Needs Python 3.11 or newer, and git and make.
#
#   make demo ARGS="--help"            arguments for the demo
#   make test ARGS="-k masks"          arguments for pytest
#   make test PYTHON=/path/to/python3  choose the Python that .venv is made with

.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14 python)
BIN := .venv/bin
PY := $(BIN)/python
PACKAGING := pyproject.toml constraints.txt

.NOTPARALLEL:
.PHONY: help demo test slow lab lint format types docs check clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1 \2/p' Makefile | awk '{ printf "  %s %-8s", $$1, $$2; $$1 = $$2 = ""; print }'

demo: .venv/.runtime  ## Hijack a real image search, rescue it, write demo/report.html
	$(PY) -m pair demo $(ARGS)

test: .venv/.test  ## Run the tests
	$(PY) -m pytest $(ARGS)

slow: .venv/.test  ## Run the tests that take minutes
	$(PY) -m pytest -m slow $(ARGS)

lab: .venv-lab/.made  ## Run the tests of the lab's page, in an environment of its own
	.venv-lab/bin/python -m pytest tests/serve/test_lab.py $(ARGS)

lint: .venv/.dev  ## Check style with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/.dev  ## Let ruff fix style in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: .venv/.dev  ## Check types with mypy
	$(PY) -m mypy

docs: .venv/.dev  ## Check that stated numbers agree with results/, build the documentation
	$(PY) scripts/readme.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

check: lint types docs test  ## All of the above checks

clean:  ## Remove .venv and everything that can be made again
	rm -rf .venv .venv-lab build dist site demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. A stamp is newer than the packaging files when there is nothing to do; a richer set of
# packages includes the poorer ones, so its stamp stands for theirs too.
INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.venv/.runtime: $(PACKAGING) | .venv/.made
	$(INSTALL) -e .
	@touch $@

.venv/.test: $(PACKAGING) | .venv/.made
	$(INSTALL) -e ".[test]"
	@touch $@ .venv/.runtime

.venv/.dev: $(PACKAGING) | .venv/.made
	$(INSTALL) -e ".[test,lint,docs]"
	@touch $@ .venv/.test .venv/.runtime

# Gradio, which the lab is made of, needs an older Pillow than the rest was measured with.
.venv-lab/.made: pyproject.toml constraints-lab.txt | .venv/.made
	$(PY) -m venv --clear .venv-lab
	.venv-lab/bin/python -m pip install --disable-pip-version-check -c constraints-lab.txt \
	  -e ".[lab]" pytest pytest-timeout websockets
	@touch $@

.venv/.made:
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  made=; old=; poor=; \
	  for python in $(PYTHONS); do \
	    "$$python" -c 'pass' 2>/dev/null || continue; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { old=$$python; continue; }; \
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null || { poor=$$python; continue; }; \
	    echo "Setting up .venv with $$("$$python" --version) (once; torch is a large download)"; \
	    "$$python" -m venv --clear .venv || exit 1; \
	    made=yes; \
	    break; \
	  done; \
	  if [ -z "$$made" ]; then \
	    if [ "$$poor" ]; then echo "make: $$poor has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"; \
	    elif [ "$$old" ]; then echo "make: $$old is $$("$$old" --version 2>&1), and Python 3.11 or newer is needed: install one, or name one with PYTHON=/path/to/python3"; \
	    else echo "make: no Python found: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3"; fi >&2; \
	    exit 1; \
	  fi; }
	$(PY) -m pip install --disable-pip-version-check --quiet --upgrade pip
	@touch $@
