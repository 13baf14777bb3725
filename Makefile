# make demo   separate a real excerpt and print how well it went
# make test   run the tests
# make check  lint, format and types
# Both make the environment first; they need Python 3.10 to 3.13 with venv, and the package registries.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' requirements.txt)

.PHONY: demo test check clean

# torch first and pinned: a looser range would take the newest build with its gigabytes of CUDA.
$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[cpu,dev]" "$(TORCH)"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
