# Each target makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/demo.installed  ## Train a CA-Stream on real pixels and report, in ten minutes on 2 cores
	$(BIN)/castream demo --output demo_output

test: $(VENV)/dev.installed  ## The whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/%.installed: setup.cfg pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo_output
