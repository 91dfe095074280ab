# Each target makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread a process: pytest-xdist runs as many processes as there are cores. Tests start many processes of the package,
# so that its bytecode is kept even where the environment asks for none.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto

.PHONY: demo app evidence test test-slow test-timm-main lint docs build clean

demo: $(VENV)/demo.installed  ## Explain photographs with a trained network, in about a minute on 2 cores
	$(BIN)/castream demo --output demo_output

app: $(VENV)/app.installed  ## A page in the browser that explains photographs
	$(BIN)/castream app

evidence: $(VENV)/dev.installed  ## The experiments of docs/evidence.md again; without DATA=tiny-imagenet-200 a quick run on made data
	$(BIN)/python -m benchmarks.evidence $(if $(DATA),--data-dir $(DATA) --results-dir evidence_work/results --page evidence_work/evidence.md,--quick)

test: $(VENV)/dev.installed  ## The fast tests, with coverage
	$(PYTEST) -m "not slow" --cov

test-slow: $(VENV)/dev.installed  ## The tests marked slow
	$(PYTEST) -m slow

test-timm-main: $(VENV)/dev.installed  ## The fast tests with timm's main branch
	$(BIN)/pip install --quiet --disable-pip-version-check git+https://github.com/huggingface/pytorch-image-models
	$(PYTEST) -m "not slow"

lint: $(VENV)/dev.installed  ## ruff, mypy and the contracts on imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/docs.installed  ## The documentation, as site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: $(VENV)/build.installed  ## The package, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

$(VENV)/%.installed: setup.cfg pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): minutes, and several GB where torch brings CUDA (README.md has the CPU build)"
	$(BIN)/pip install --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo_output dist site
