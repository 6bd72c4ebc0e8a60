# Each target sets itself up in $(VENV) from nothing but make and python3; a second run starts at once.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
comma := ,
needs = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(1), $(2)))' || { echo \
	"Python $(1).$(2) or newer is needed, and '$(PYTHON)' is not that. Try: PYTHON=python3.12" >&2; exit 1; }

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEWEST := $(VENV)/newest
# Python compiles a module when it is first imported, and most of those that are installed never are. The variable, which
# many containers set, would have every process compile them again.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all compile newest lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 picks another interpreter, VENV=path another environment."

demo: $(INSTALLED) ## check the kernels, train a small model in both frameworks (ARGS=--steps=20)
	$(BIN)/python examples/demo.py $(ARGS)

# One worker more than there are cores, as some tests wait. On a GPU the time goes into compiling, on the host; the workers
# share the GPU's memory. Some tests take a minute: a worker that is done takes what others have not begun.
WORKERS = $(if $(GPU),8,$(shell $(BIN)/python -c 'import os; print(os.cpu_count() + 1)'))
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(INSTALLED) ## the tests of the library (ARGS="-k name" picks some)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED) ## those, and all that compile for long, train, run the docs' code or are of bench/
	$(PYTEST) tests bench $(ARGS)

# The oldest release of Triton, with which tiles were chosen, and what JAX needs to lower for a GPU.
compile: $(INSTALLED) ## compile the kernels for an H100 from both frameworks, without a GPU
	$(BIN)/python $(PIP) --upgrade --no-deps --target $(VENV)/offline \
		triton==3.6.0 jax-cuda13-plugin==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')
	PYTHONPATH=$(VENV)/offline $(BIN)/python -m pytest -n auto -k compile $(ARGS) \
		tests/kernels/test_hopper.py tests/torch_front/test_launch.py tests/jax_front/test_lowering.py \
		bench/lab/tests/test_sanitize.py

# Releases of JAX and jax-triton that Python 3.11 does not have, with the newest Triton. There is no PyTorch.
newest: ## compile them from the newest JAX, without PyTorch either (PYTHON=python3.12)
	$(call needs,3,12)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP) \
		jax==0.12.0.1 jax-triton==0.3.1 triton==3.9.0 numpy==2.4.6
	$(NEWEST)/bin/python $(PIP) --no-deps jax-cuda13-plugin==0.12.0.1
	$(NEWEST)/bin/python -m tests.programs.lowering gathered methods hopper

lint: $(INSTALLED) ## style, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Without the notice of the theme's authors about the next major release of MkDocs.
docs: $(INSTALLED) ## build the documentation as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and all caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	$(call needs,3,11)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --editable '.[dev$(if $(GPU),$(comma)cuda)]'
	@touch $@
