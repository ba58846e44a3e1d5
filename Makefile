# make demo | test | lint | docs | clean. What a target needs is installed into .venv, in the versions of constraints.txt,
# when it is missing or older than pyproject.toml or constraints.txt. Needed on the machine: make and Python >= 3.11.
#
# PYTHON=python3.12 make demo                                                 picks the interpreter of a new .venv
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo   spares a Linux machine without a GPU the CUDA build

comma := ,
VENV := .venv
BIN := $(VENV)/bin
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)
# torchvision is not in the core and modules are compiled when first imported: both make the installation shorter.
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e
SOURCES := src tests $(wildcard examples scripts)

# Page faults cost a training step on a CPU up to a fifth of its time under glibc's malloc. The decay has to be finite:
# without one the memory grows with every step.
JEMALLOC := $(firstword $(wildcard /usr/lib/$(shell uname -m)-linux-gnu/libjemalloc.so.2 \
	/usr/lib64/libjemalloc.so.2 /usr/lib/libjemalloc.so.2 /usr/local/lib/libjemalloc.so.2))
WITH_JEMALLOC := $(if $(JEMALLOC),LD_PRELOAD=$(JEMALLOC) MALLOC_CONF=dirty_decay_ms:5000$(comma)muzzy_decay_ms:5000)

# How long an OpenMP thread spins before it sleeps: not at all, and two threads are no quicker than one; for long, and
# two processes that share the cores hold each other up.
GOMP_SPINCOUNT ?= 100000
export GOMP_SPINCOUNT

.PHONY: help demo test lint docs clean
.SILENT:

help:
	echo "make demo    train the embedded world's flow model to follow its prompts: about 11 minutes on 2 cores"
	echo "make test    lint, types, import rules and tests"
	echo "make lint    the same without the tests"
	echo "make docs    the documentation, to site/index.html"
	echo "make clean   remove .venv, site and caches (not runs)"

demo: $(VENV)/.core
	echo "== demo: base model, training, comparison, report in runs/demo (about 11 minutes on 2 cores)"
	$(WITH_JEMALLOC) $(BIN)/burnish demo --output runs/demo

test: lint
	echo "== pytest"
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	echo "== ruff check"
	$(BIN)/ruff check $(SOURCES)
	echo "== ruff format --check"
	$(BIN)/ruff format --check $(SOURCES)
	echo "== pyright"
	$(BIN)/pyright
	echo "== lint-imports"
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.docs
	echo "== mkdocs build --strict"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	echo "site/index.html"

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	for python in $(PYTHONS); do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "== $(VENV): created with $$($$python --version)"; \
			exec $$python -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "make: none of [$(PYTHONS)] is a Python >= 3.11 with venv and ensurepip: install one (Debian: python3-venv) or set PYTHON=/path/to/python" >&2; \
	exit 1

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	echo "== $(VENV): installing burnish (1.3 GB, about a minute)"
	$(INSTALL) .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	echo "== $(VENV): installing burnish[test] (1.6 GB, one to two minutes)"
	$(INSTALL) '.[test]'
	touch $(VENV)/.core $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	echo "== $(VENV): installing burnish[docs] (1.4 GB, about a minute)"
	$(INSTALL) '.[docs]'
	touch $(VENV)/.core $@
