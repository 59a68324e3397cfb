# On a fresh machine with python3 and make, start with `make quickstart` or `make test`. Both install everything into .venv first.
PYTHON ?= python3
# An index for torch in place of pip's default, for example the address of PyTorch's CPU wheels.
TORCH_INDEX_URL ?=
# Further arguments of pytest: `make test PYTEST_ARGS="-n 0 -k stages"`.
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# Two test files at a time; files whose tests start several processes run last, one after another (tests/conftest.py).
PYTEST := $(RUN) -m pytest -n 2 --durations=10
PIP := $(RUN) -m pip --disable-pip-version-check install -q
STAMP := $(VENV)/.installed
# Also false for an incomplete .venv that an interrupted run left.
has_venv := $(RUN) -m pip --version >/dev/null 2>&1
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Every shell script is found by its first line, or by the line that tells shellcheck its dialect.
SHELL_SCRIPT := ^(\#!.*\<(ba|da|k)?sh\>|\# shellcheck shell=)
export DS_BUILD_OPS := 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv nvme lint shellcheck test slow docs quickstart compare bench clean distclean

help:  ## prints this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

venv: $(STAMP)  ## creates .venv, installs everything into it and builds csrc

# Installs again after a change of the requirements or of csrc.
$(STAMP): pyproject.toml constraints.txt setup.py build_backend.py $(shell find csrc -type f)
	@$(has_venv) || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
	  "Python %d.%d is not supported; use one of 3.10 to 3.12: make venv PYTHON=python3.11" % v)'
	@$(has_venv) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade -c constraints.txt pip setuptools wheel
	@$(install_torch)
	$(PIP) --no-build-isolation -c constraints.txt deepspeed
	$(PIP) --no-build-isolation -c constraints.txt -e '.[dev]'
	@$(RUN) -m megatron_patch.ops
	@touch $@

# docs/parallelism.md has this command. Here it compiles without debug symbols, which would take almost half of the time.
nvme: $(VENV)/.nvme  ## builds DeepSpeed's NVMe operator; needs libaio-dev

$(VENV)/.nvme: WITHOUT_SYMBOLS := $(abspath $(VENV))/bin/without-symbols-
$(VENV)/.nvme: $(STAMP)
	@printf '#!/bin/sh\nexec $(CC) "$$@" -g0\n' >$(WITHOUT_SYMBOLS)cc
	@printf '#!/bin/sh\nexec $(CXX) "$$@" -g0\n' >$(WITHOUT_SYMBOLS)cxx
	@chmod +x $(WITHOUT_SYMBOLS)cc $(WITHOUT_SYMBOLS)cxx
	CC=$(WITHOUT_SYMBOLS)cc CXX=$(WITHOUT_SYMBOLS)cxx LDFLAGS='-Wl,--no-as-needed -laio' DS_BUILD_AIO=1 DS_BUILD_PIN_MEMORY=1 \
	  $(PIP) --no-build-isolation --force-reinstall --no-deps --no-cache-dir -c constraints.txt deepspeed
	@$(RUN) -c 'from megatron_patch.engine.swapping import require_async_io; require_async_io()'
	@touch $@

# torch is installed before the packages that require it, so that none of them installs a newer one.
# Without a GPU the CPU build is installed, which is ten times smaller.
define install_torch
if [ "$$($(RUN) -c 'import importlib.metadata as m; print(m.version("torch").partition("+")[0])' 2>/dev/null)" = "$(TORCH)" ]; then :; \
elif [ -n "$(TORCH_INDEX_URL)" ]; then \
  echo "torch $(TORCH), from TORCH_INDEX_URL"; $(PIP) --index-url "$(TORCH_INDEX_URL)" "torch==$(TORCH)"; \
elif nvidia-smi -L 2>/dev/null | grep -q GPU; then \
  echo "torch $(TORCH), for the GPUs of this machine"; $(PIP) -c constraints.txt "torch==$(TORCH)"; \
elif $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null; then \
  echo "torch $(TORCH), the CPU build"; \
else \
  echo "torch $(TORCH): pip finds no CPU build and installs the default one (several GB)."; \
  echo "To avoid that, set TORCH_INDEX_URL to the address of the CPU wheels (see PyTorch's installation page)."; \
  $(PIP) -c constraints.txt "torch==$(TORCH)"; \
fi
endef

lint: venv  ## checks style (ruff), types (mypy) and shell scripts (shellcheck)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	@$(MAKE) --no-print-directory shellcheck

# Also for pre-commit. Without --no-index, git would find nothing in an unpacked archive.
shellcheck:
	git grep --no-index --exclude-standard -lzE '$(SHELL_SCRIPT)' -- ':!*.md' | xargs -0 $(VENV)/bin/shellcheck

test: lint  ## lint, then all tests except slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

slow: venv  ## only the slow tests, which take minutes each
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

docs: venv  ## builds the documentation as a site into build/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

quickstart: venv  ## trains a small model in a few minutes: patches, then tokens
	$(RUN) examples/quickstart/run.py

compare: venv  ## the quick start, then token-level training at equal cost
	$(RUN) examples/quickstart/run.py --compare

bench: venv  ## runs every benchmark
	@set -e; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(RUN) "$$file"; done

clean:  ## removes build products and caches; keeps .venv and runs/
	rm -rf build dist *.egg-info megatron_patch/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## also removes .venv and runs/
	rm -rf $(VENV) runs
