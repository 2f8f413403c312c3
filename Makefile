# Every target sets up what it needs: Python >= 3.11 and make are enough. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

# torch, libtpu and the CUDA plugin each live in an environment of their own: where libtpu or a GPU plugin is installed, jax
# looks for the chip, and torch brings a gigabyte that nobody else needs. Both are pinned to the jax of Python 3.11.
PINNED_PYTHON ?= python3.11
PARITY_VENV ?= .venv-parity
HARDWARE_VENV ?= .venv-hardware
PARITY_PACKAGES = 'transformers>=5.23,<6' 'peft>=0.21' 'bitsandbytes>=0.50'
HARDWARE_PACKAGES = 'jax==0.10.2' 'libtpu==0.0.42.*' 'jax-cuda13-plugin==0.10.2' 'jax-cuda13-pjrt==0.10.2' \
	nvidia-cuda-nvcc nvidia-nvvm
HARDWARE_ENV = JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost ALLOW_MULTIPLE_LIBTPU_LOAD=1

# Mosaic GPU kernels can be simulated from jax 0.11 on: their tests run there only.
NEWER_TESTS = tests/test_architecture.py tests/test_devices.py tests/test_config.py tests/nn tests/objectives \
	tests/parallel/test_context.py tests/parallel/test_hosts.py tests/kernels/test_ring_attention.py \
	tests/kernels/test_attention_hopper.py tests/kernels/test_decode_attention.py \
	tests/kernels/test_selective_scan_hopper.py
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS)
# Twice quiet: errors are shown, notices are not.
PIP_FLAGS = --quiet --quiet --disable-pip-version-check
ifndef DEMO_DIR
DEMO_DIR := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
endif
DEMO_PROMPT ?= The for statement is used to

.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-parity setup-hardware demo test lint format evidence slow multiprocess matrix mixers adapters long parity \
	hardware newer full clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# ---- environments: made again only when pyproject.toml changes -------------------------------------------------------

define make_venv
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "llmjax needs Python 3.11 or newer and '$(1)' is not: name one, as in make PYTHON=python3.12" >&2; exit 1; }
@[ -x $(2)/bin/pip ] || { echo "making $(2)"; $(1) -m venv --clear $(2); }
endef

$(VENV)/.ready: pyproject.toml
	$(call make_venv,$(PYTHON),$(VENV))
	@echo "installing llmjax into $(VENV)"
	@$(VENV)/bin/pip install $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/.ready-test: pyproject.toml
	$(call make_venv,$(PYTHON),$(VENV))
	@echo "installing llmjax and what its tests need into $(VENV)"
	@$(VENV)/bin/pip install $(PIP_FLAGS) --editable '.[test]'
	@touch $(VENV)/.ready $@

# torch comes first and exactly, so that no later package chooses another build of it.
$(PARITY_VENV)/.ready: pyproject.toml Makefile
	$(call make_venv,$(PINNED_PYTHON),$(PARITY_VENV))
	@echo "installing torch, transformers, peft and bitsandbytes into $(PARITY_VENV)"
	@$(PARITY_VENV)/bin/pip install $(PIP_FLAGS) 'torch==2.13.0'
	@$(PARITY_VENV)/bin/pip install $(PIP_FLAGS) --editable '.[test]' $(PARITY_PACKAGES)
	@touch $@

$(HARDWARE_VENV)/.ready: pyproject.toml Makefile
	$(call make_venv,$(PINNED_PYTHON),$(HARDWARE_VENV))
	@echo "installing the TPU and GPU compilers into $(HARDWARE_VENV)"
	@$(HARDWARE_VENV)/bin/pip install $(PIP_FLAGS) --editable '.[test]' $(HARDWARE_PACKAGES)
	@touch $@

setup: $(VENV)/.ready  ## install llmjax into .venv
setup-test: $(VENV)/.ready-test  ## install llmjax and what its tests need into .venv
setup-parity: $(PARITY_VENV)/.ready
setup-hardware: $(HARDWARE_VENV)/.ready

# ---- the two commands of the README ----------------------------------------------------------------------------------

demo: setup  ## train on Python's documentation, then generate (under 4 minutes on 2 cores)
	$(VENV)/bin/llmjax train experiments/quickstart.py --run-dir=$(DEMO_DIR) $(ARGS)
	$(VENV)/bin/llmjax generate $(DEMO_DIR) --prompt='$(DEMO_PROMPT)'

test: setup-test  ## the quick tests (under 12 minutes on 2 cores); ARGS='tests/nn -k rope' narrows them
	$(PYTEST) $(ARGS)

# ---- checks and pages ------------------------------------------------------------------------------------------------

lint: setup-test  ## ruff (rules and layout) and mypy
	@status=0; for check in 'ruff check .' 'ruff format --check .' mypy; do \
		echo "$$check"; $(VENV)/bin/$$check || status=1; done; exit $$status

format: setup-test  ## lay the code out and mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

evidence: setup-test  ## run the tests that have an outside oracle; write docs/evidence.md and docs/evidence.json
	$(HARDWARE_ENV) $(VENV)/bin/python -m scripts.evidence --parity=$(PARITY_VENV) --hardware=$(HARDWARE_VENV)

# ---- the slow suites -------------------------------------------------------------------------------------------------

slow: setup-test  ## kill and resume, convergence
	$(PYTEST) -m "slow and not long" $(ARGS)

multiprocess: setup-test  ## several jax processes on loopback
	$(PYTEST) tests/multiprocess -m multiprocess -n 0 $(ARGS)

matrix: setup-test  ## every leaf of every config
	$(PYTEST) -m "matrix and not long" $(ARGS)

adapters: setup-test  ## every adapter and quantisation method: laws, oracles; ARGS='-k DoRA' narrows them
	$(PYTEST) -m "adapters and not long" $(ARGS)

mixers: setup-test  ## every sequence mixer and stack: laws, oracles, transformations; ARGS='-k Mamba' narrows them
	$(PYTEST) -m "mixers and not long" $(ARGS)

long: setup-test setup-hardware  ## what CI has no time for: pairs of parts, all meshes, pods' plans (an hour or two)
	$(PYTEST) -m "long and not hardware" $(ARGS)
	$(HARDWARE_ENV) $(HARDWARE_VENV)/bin/python -m pytest tests/hardware -m "long and hardware" -n 1 $(ARGS)

parity: setup-parity  ## torch, transformers, peft and bitsandbytes beside our code (own environment, Python 3.11)
	OMP_NUM_THREADS=1 $(PARITY_VENV)/bin/python -m pytest -n $(WORKERS) -m parity $(ARGS)

hardware: setup-hardware  ## compile for TPUs and GPUs that are not there (own environment, Python 3.11)
	$(HARDWARE_ENV) $(HARDWARE_VENV)/bin/python -m pytest tests/hardware -n $(WORKERS) -m "hardware and not long" $(ARGS)

newer: setup-test  ## the subset CI runs with the newest Python and jax: make newer PYTHON=python3.13 VENV=.venv-newer
	$(VENV)/bin/llmjax train experiments/quickstart.py --run-dir=$(DEMO_DIR) --train.steps=3
	$(PYTEST) $(wildcard $(NEWER_TESTS)) $(ARGS)

full: test lint slow multiprocess matrix mixers adapters long parity hardware  ## everything

clean:  ## remove environments, caches and test records (never runs/)
	rm -rf $(VENV) $(PARITY_VENV) $(HARDWARE_VENV) .venv-newer .cache .evidence .pytest_cache .ruff_cache .hypothesis \
		build dist
