# `make repro` and `make test`, each alone on a machine with Python >= 3.11 and make; `make help` for the rest.
PYTHON  ?= python3
PROFILE ?=
DATA    ?=
TEXT    ?=
SET     ?=
GROUP   =
ARGS    ?=
JOBS    ?= 2
EXTRA   ?= cpu
TORCH_INDEX ?=

SHELL   := /bin/sh
BIN     := .venv/bin
TORCH   := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# When what is locked changes, or EXTRA, the environment is built again.
STAMP   := .venv/.installed-$(EXTRA)-$(subst ==,-,$(TORCH))-$(shell cksum < requirements.lock | cut -d ' ' -f 1)
PIP     := $(BIN)/python -m pip --disable-pip-version-check

ifeq ($(filter $(EXTRA),cpu gpu),)
$(error EXTRA=$(EXTRA): cpu or gpu)
endif

.PHONY: help repro test lint interop triton lab report environment lock

help:
	@echo 'make repro                      every table and figure, at the profile that params.yaml names'
	@echo 'make repro PROFILE=smoke        the same at another profile, in .work/smoke'
	@echo 'make repro ARGS=finetune@opl    one row, and what it needs (any arguments of `dvc repro`)'
	@echo 'make repro PROFILE=study GROUP=loss   the rows that answer one question, and what they need (groups: params.yaml)'
	@echo 'make repro DATA=/path/to/mine   everything on your collection, in a folder of its own (also hub, longembed; any PROFILE)'
	@echo '           TEXT=/path/to/texts  … pretrained on your text (a folder of parquet, jsonl or txt; also hub)'
	@echo '           SET="section.key=value …"   … with other settings than params.yaml, for this run alone'
	@echo 'make report [PROFILE=smoke]     open the report (with DATA=…, that of your collection)'
	@echo 'make lab                        the notebooks, in JupyterLab'
	@echo 'make test [ARGS="-k losses"]    the tests, in JOBS=2 processes (JOBS=0: in one, for a debugger)'
	@echo 'make lint                       the form of the code (ruff)'
	@echo 'make interop                    the tests with sentence-transformers, mteb and endpoints; it installs mteb and a client'
	@echo 'make triton                     the tests of the kernels for a GPU, in the interpreter of Triton, which it installs (700 MB, Linux)'
	@echo 'make environment                build .venv (all of the above do, when it is missing or out of date)'
	@echo 'make lock                       the lock files anew, from pyproject.toml (needs uv)'
	@echo
	@echo 'PYTHON=python3.12               the Python to build .venv with, 3.11 or newer'
	@echo 'TORCH_INDEX=https://download.pytorch.org/whl/cpu    torch for the CPU only, on Linux 5 GB less to fetch'
	@echo 'EXTRA=gpu                       faiss-gpu in place of faiss-cpu (Linux, CUDA 12)'

# A path reaches the recipe through the environment: it may hold blanks and quotes.
export DATA TEXT SET GROUP
COLLECTION = $(if $(DATA),"--data=$$DATA") $(if $(TEXT),"--text=$$TEXT") $(if $(SET),"--set=$$SET")

repro: environment
	@$(BIN)/python -m lib.pipeline repro $(PROFILE) $(COLLECTION) $(if $(GROUP),"--group=$$GROUP") $(ARGS)

# Two processes of one thread each: the longest tests wait for one thread.
test: environment
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: environment
	@$(BIN)/ruff format --check lib tests notebooks
	@$(BIN)/ruff check lib tests notebooks

interop: environment
	@$(PIP) install -q --no-deps --use-pep517 --require-hashes -r requirements-interop.lock
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/model/test_interop.py tests/benchmark/test_hosted.py $(ARGS)

triton: environment
	@$(PIP) install -q --no-deps --require-hashes -r requirements-triton.lock
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/kernels/test_gpu.py tests/kernels/test_gpu_mlp.py $(ARGS)

lab: environment
	@$(BIN)/python -m jupyterlab --notebook-dir=. notebooks/00_start_here.ipynb

report: environment
	@$(BIN)/python -m lib.pipeline report $(PROFILE) $(COLLECTION)

# Locked, so that two first runs at once build it once; the system frees the lock of a make that was killed.
environment:
	@test -e $(STAMP) || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c 'import fcntl, subprocess, sys; held = open("Makefile"); fcntl.flock(held, fcntl.LOCK_EX); sys.exit(subprocess.call(sys.argv[1:]))' \
	    $(MAKE) --no-print-directory $(STAMP) || \
	    { echo "The environment is not complete. The reason stands above; 'make $(or $(MAKECMDGOALS),repro)' begins it again." >&2; exit 1; }; }

# torch first and by itself: with its hashes in the lock pip would take the CUDA build everywhere.
$(STAMP): requirements.lock
	@echo "Building .venv (about 2 minutes, 2 GB; once)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install -q $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) install -q --no-deps --use-pep517 --require-hashes -r requirements.lock
	@test $(EXTRA) = cpu || { $(PIP) uninstall -q -y faiss-cpu && $(PIP) install -q 'faiss-gpu>=1.14,<1.16'; }
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@$(PIP) check
	@touch $(STAMP)

LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra cpu --extra test pyproject.toml \
  --no-emit-package torch --custom-compile-command "make lock"

lock:
	$(LOCK) --output-file requirements.lock
	$(LOCK) --extra interop --constraint requirements.lock --output-file requirements-interop.lock
	sed -n 's/^triton = \["\(.*\)"\]/\1/p' pyproject.toml | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps --custom-compile-command "make lock" \
	  --output-file requirements-triton.lock -
