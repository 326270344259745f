.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# One stamp per set of extras. torch comes first, from the CPU build where one is at hand: on Linux x86-64 the
# registry's own build brings several GB of CUDA.
$(VENV)/.venv-made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.extra-%: $(VENV)/.venv-made pyproject.toml
	$(BIN)/pip install --quiet -e '.[$*]'
	touch $@

demo: $(VENV)/.extra-demo ## Compile MiniLM-L6 and embed the sample passages
	$(BIN)/tilewright demo

test: $(VENV)/.extra-test ## Run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.extra-dev ## Lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/layout/typecheck.py

bench: $(VENV)/.extra-bench ## Print the encoder benchmark table
	$(BIN)/python benchmarks/encoders.py

clean: ## Remove the virtual environment and build output
	rm -rf $(VENV) build *.egg-info

.PHONY: help demo test check bench clean
