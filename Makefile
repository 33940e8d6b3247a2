# Two commands do all the set-up on a machine that has Python 3.11 or newer and make:
#   make demo   virtual environment, installation, the main job
#   make test   the same, then every test
# Their plain pip equivalents stand in README.md.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast check overhead clean

demo: $(STAMP)
	$(BIN)/tokenmerge demo

test: demo
	$(BIN)/python -m pytest -n 2 -m "not slow"
	$(BIN)/python -m pytest -m slow

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/models_page.py --check
	$(BIN)/python -m build --wheel --outdir dist

overhead: $(STAMP)
	$(BIN)/python benchmarks/overhead.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
