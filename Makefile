# make quickstart and make test are all that a fresh machine needs; everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where torch comes from, if not from pip's own configuration: for example the address of PyTorch's wheels for CPUs.
TORCH_INDEX_URL ?=
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)
TORCH := $(shell grep -m1 '^torch==' constraints.txt)
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv lint test slow quickstart compare bench clean distclean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## .venv with everything in it, csrc built

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt pip setuptools wheel
	@$(BIN)/python -c "import torch" 2>/dev/null || $(MAKE) --no-print-directory torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(BIN)/python -m megatron_patch.ops
	@touch $(STAMP)

.PHONY: torch
torch:
ifeq ($(HAS_GPU),yes)
	$(BIN)/python -m pip install -q $(TORCH_INDEX) "$(TORCH)" -c constraints.txt
else
	$(BIN)/python -m pip install -q $(TORCH_INDEX) "$(TORCH)+cpu" || { \
	  echo "No CPU build of torch at pip's usual places: taking the default build, which is large. TORCH_INDEX_URL=… names another place."; \
	  $(BIN)/python -m pip install -q "$(TORCH)" -c constraints.txt; }
endif

lint: venv  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## the whole test suite
	$(BIN)/python -m pytest -m "not slow" --durations=15

slow: venv  ## long studies
	$(BIN)/python -m pytest -m slow --durations=15

quickstart: venv  ## text in, a model out: patches, then tokens, in some minutes
	$(BIN)/python examples/quickstart/run.py

compare: venv  ## the quick start beside token-level training at equal cost
	$(BIN)/python examples/quickstart/run.py --compare

bench: venv  ## all benchmarks
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:  ## build products and caches
	rm -rf build dist *.egg-info megatron_patch/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f $(STAMP)

distclean: clean  ## also .venv and runs
	rm -rf $(VENV) runs
