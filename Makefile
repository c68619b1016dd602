# One environment, made on first use; every target works from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

MATRIX := tests/collapsing tests/sites tests/measure tests/structure tests/pruning tests/test_export.py tests/test_imports.py \
	tests/integration/test_private.py tests/integration/test_entropy_pruning.py
# The lowest of all, on the lowest Python; networks of transformers, and thousands of random ones, are the newest's
LOWEST_PYTHON ?= python3.11
LOWEST := $(VENV)-lowest
NEWEST := $(VENV)-newest

.PHONY: help demo test device matrix prove lint format docs notebooks networks index tensorboard bench clean

help:  ## List the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/'

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo  ## Train, prune, collapse, export and verify on handwritten digits; 36 s on two cores, once installed.
	$(BIN)/python -m lightning_easier.zoo.demo --output demo_output

test: $(VENV)/.dev lint  ## Lint, then run all tests.
	$(BIN)/python -m pytest -n 2 --dist worksteal

device: $(VENV)/.dev  ## Run the tests for GPUs on a device that is made of the host's memory for them; needs a C++ compiler.
	PATH="$(abspath $(BIN)):$$PATH" TORCH_EXTENSIONS_DIR=$(abspath $(VENV))/extensions $(BIN)/python -m pytest -p tests.devices.elsewhere tests/integration/test_gpu.py

matrix:  ## Test in fresh environments with the lowest versions (tests/lowest.txt), then with the newest; gigabytes.
	$(LOWEST_PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable '.[demo,zoo]' 'pytest>=8.4' 'pytest-xdist>=3.6' \
		'hypothesis>=6.115' 'POT>=0.9.7.post1'
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal $(MATRIX) --ignore tests/sites/test_networks.py --ignore tests/sites/test_paths.py \
		--ignore tests/sites/test_feeding.py --ignore tests/collapsing/test_collapse_networks.py
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --editable '.[dev]'
	$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal $(MATRIX)

prove: $(VENV)/.dev  ## Collapse 10,000 random linear networks, and 10,000 as users write them; some hours.
	COLLAPSE_EXAMPLES=10000 $(BIN)/python -m pytest -n 2 --show-capture=no tests/collapsing/test_collapse_properties.py tests/collapsing/test_collapse_fuzz.py

lint: $(VENV)/.dev  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## Build the site into the folder `site`, strictly; `python -m http.server -d site` shows it.
	$(BIN)/mkdocs build --strict

notebooks: $(VENV)/.dev  ## Execute the notebooks in place, and keep how long each took.
	$(BIN)/python notebooks/run.py

tensorboard: $(VENV)/.demo  ## Serve the demo's curves on http://localhost:6006/#images.
	$(BIN)/tensorboard --logdir demo_output

networks: $(VENV)/.dev  ## Write docs/networks.md: which rectifier calls of real networks become sites.
	$(BIN)/python -m tests.network_table

index:  ## Write docs/maintainers/tests.md: all tests by folder and file.
	$(PYTHON) docs/maintainers/index_of_tests.py

bench: $(VENV)/.dev  ## Measure what it costs and what it saves: one table in bench_results; BENCH='--quick' for five minutes.
	$(BIN)/python -m benchmarks $(BENCH) --output bench_results

clean:  ## Remove the environments, and what the demo, the site and the benchmarks made.
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .venv-gpu demo_output site bench_results gpu_results
