# `make quickstart` and `make test` are all that a fresh machine needs: python3 and make. Everything lives in .venv.
PYTHON ?= python3
# Where torch comes from, if not from where pip looks by itself: for example the address of PyTorch's wheels for CPUs.
TORCH_INDEX_URL ?=
# More for pytest: `make test PYTEST_ARGS="-n 0 -k stages"`.
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# Two files at a time, and at the end those whose tests are several processes by themselves (tests/conftest.py).
PYTEST := $(RUN) -m pytest -n 2 --durations=10
PIP := $(RUN) -m pip --disable-pip-version-check install -q
STAMP := $(VENV)/.installed
# False also for what an interrupted run left.
has_venv := $(RUN) -m pip --version >/dev/null 2>&1
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))
export DS_BUILD_OPS := 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv lint test slow quickstart compare bench clean distclean

help:  ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

venv: $(STAMP)  ## .venv with everything in it, csrc built

# Installed again when what is installed, or csrc, has changed.
$(STAMP): pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	@$(has_venv) || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
	  "Python %d.%d is not supported; name one of 3.10 to 3.12: make venv PYTHON=python3.11" % v)'
	@$(has_venv) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade -c constraints.txt pip setuptools wheel
	@$(install_torch)
	$(PIP) --no-build-isolation -c constraints.txt deepspeed
	$(PIP) --no-build-isolation -c constraints.txt -e '.[dev]'
	@$(RUN) -m megatron_patch.ops
	@touch $@

# torch before everything that asks for it, so that nothing brings a newer one; without a GPU its build for CPUs, which is ten times smaller.
define install_torch
if [ "$$($(RUN) -c 'import importlib.metadata as m; print(m.version("torch").partition("+")[0])' 2>/dev/null)" = "$(TORCH)" ]; then :; \
elif [ -n "$(TORCH_INDEX_URL)" ]; then \
  echo "torch $(TORCH), from TORCH_INDEX_URL"; $(PIP) --index-url "$(TORCH_INDEX_URL)" "torch==$(TORCH)"; \
elif nvidia-smi -L 2>/dev/null | grep -q GPU; then \
  echo "torch $(TORCH), for the GPUs of this machine"; $(PIP) -c constraints.txt "torch==$(TORCH)"; \
elif $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null; then \
  echo "torch $(TORCH), the build for CPUs"; \
else \
  echo "torch $(TORCH): pip finds no build for CPUs alone and takes the default one, several GB;"; \
  echo "TORCH_INDEX_URL=... (see PyTorch's installation page for the address of its CPU wheels) avoids that."; \
  $(PIP) -c constraints.txt "torch==$(TORCH)"; \
fi
endef

lint: venv  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint  ## lint and all tests but the slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

slow: venv  ## the long tests
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

quickstart: venv  ## text in, a model out: patches first, then tokens, in some minutes
	$(RUN) examples/quickstart/run.py

compare: venv  ## the quick start beside token-level training at equal cost
	$(RUN) examples/quickstart/run.py --compare

bench: venv  ## every benchmark
	@$(if $(BENCHMARKS),set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(RUN) $$file; done,echo "no benchmarks here")

clean:  ## removes build products and caches; runs/ stays
	rm -rf build dist *.egg-info megatron_patch/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## also removes .venv and runs/
	rm -rf $(VENV) runs
