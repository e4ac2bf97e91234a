# Every target sets up what it needs; a second call only does the work. `make help` lists them.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

# Plain PyPI would bring several GB of CUDA. Where wheels are found locally (PIP_FIND_LINKS), nothing else is asked.
ifndef PIP_FIND_LINKS
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: help demo test test-slow lint types docs bench bench-full bench-peers clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.installed  ## train a small language model on built-in text: score, picture and sample, in minutes
	$(RUN)/tidegate train --recipe recipes/demo.yaml

test: $(VENV)/.installed  ## all quick tests, docstring examples included, on all cores
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto

test-slow: $(VENV)/.installed  ## the tests that take longer than CI allows
	$(RUN)/python -m pytest -m slow

lint: $(VENV)/.installed  ## ruff: rules and format
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/.installed  ## mypy
	$(RUN)/mypy

docs: $(VENV)/.docs  ## the documentation into site/, links checked
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

bench: $(VENV)/.installed  ## ops, mixers, cells, models and single tokens: tables, JSON and pictures in reports/bench
	$(RUN)/tidegate bench ops
	$(RUN)/tidegate bench mixers
	$(RUN)/tidegate bench cells
	$(RUN)/tidegate bench model
	$(RUN)/tidegate bench decode

# Whole layers at batch 8 and T = 65,536 would need more memory than most machines have.
bench-full: $(VENV)/.installed  ## T to 65,536, batch 1 and 8, threads 1 and 2, peak memory: hours, 16 GB of memory
	$(RUN)/tidegate bench ops --lengths 512,4096,16384,65536 --batch 1,8 --threads 1,2 --memory --out reports/bench/full
	$(RUN)/tidegate bench mixers --lengths 512,4096,16384,65536 --threads 1,2 --memory --out reports/bench/full
	$(RUN)/tidegate bench mixers --lengths 512,4096,8192 --batch 8 --threads 1,2 --out reports/bench/full-batch-8
	$(RUN)/tidegate bench model --lengths 512,4096,16384,65536 --threads 1,2 --memory --out reports/bench/full
	$(RUN)/tidegate bench model --lengths 512,4096 --batch 8 --threads 1,2 --out reports/bench/full-batch-8
	$(RUN)/tidegate bench decode --batch 1,8 --threads 1,2 --out reports/bench/full

bench-peers: $(VENV)/.installed .venv-peers/.installed .venv-peers-fla/.installed  ## beside other libraries, about an hour
	$(RUN)/python -m tidegate.bench.peers

clean:  ## remove compiled kernels, caches and built documentation; runs/, reports/ and .venv stay
	find . -path ./$(VENV) -prune -o \( -name '*.nbi' -o -name '*.nbc' -o -name '*.pyc' \) -exec rm -f {} +
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamp is written last, so an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: tidegate needs Python 3.11 or newer, seen "$(PYTHON)" =' "$$($(PYTHON) --version 2>&1);" \
	       'name another one: make PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo 'error: $(PYTHON) comes without venv; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'setting up $(VENV), once: a minute or two ...'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c constraints.txt $(TORCH_INDEX) torch
	$(RUN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

.venv-peers/.installed: bench/peers/requirements.txt
.venv-peers-fla/.installed: bench/peers/requirements-fla.txt
.venv-peers/.installed .venv-peers-fla/.installed:
	@echo 'setting up $(@D), once ...'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(TORCH_INDEX) $$(grep '^torch==' $<)
	$(@D)/bin/pip install --quiet $(TORCH_INDEX) -r $<
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(RUN)/pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@
