# Each of these commands also sets up the environment; Python 3.11 or newer and make are required:
#   make demo   create the virtual environment, install the package, run the demo
#   make test   the same set-up, then run all tests
# README.md and CONTRIBUTING.md give the equivalent commands with pip.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# modules are compiled when they are first imported, because compiling all installed modules takes over a minute; the byte code must
# then be stored, even if a container's environment disables it, or each process would compile again
unexport PYTHONDONTWRITEBYTECODE

# $(call install,folder,requirements): uv installs in a fifth of the time of pip; pip is the fallback where only it has the package index
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip uv
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) \
		|| $(1)/bin/python -m pip install --quiet --no-compile $(2)
endef

# the oldest supported versions, in a separate environment
OLD := .venv-oldest
# (the interpreter of Triton 3.6 does not work with a newer NumPy)
OLDEST := torch==2.11.0 torchvision==0.26.0 timm==1.0.26 transformers==5.17.0 open_clip_torch==3.3.0 accelerate==1.12.0 cyclopts==5.0.0 numpy==2.3.5

.PHONY: demo test test-fast test-oldest check kernels docs overhead benchmarks benchmarks-gpu clean

demo: $(STAMP)
	$(BIN)/tokenmerge demo

# one thread for each of two processes, because two threads each spend half of the time waiting (three processes are no faster)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# every kind of block and head runs with the oldest versions; all timm names, which differ only in their sizes, and tests that do not
# depend on other libraries run with the newest versions only; matching and merging run in PyTorch here, as without a C compiler, and in C
# with the newest versions
NEWEST_ONLY := test_layout test_public test_reference test_project test_config test_schedule tools/test_benchmarks tools/test_break_even tools/test_compare tools/test_docs tools/test_paper tools/test_site tools/test_sounds \
	tools/test_videos tools/test_tools
test-oldest: $(OLD)/.installed
	TOKENMERGE_TESTS_WITHOUT_C=1 OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" \
		-k "not test_every_name and not test_every_other_flat_name" \
		$(foreach name,$(NEWEST_ONLY),--ignore=tests/$(name).py)

$(OLD)/.installed: pyproject.toml Makefile
	$(call install,$(OLD),$(OLDEST) --editable ".[dev]")
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/models_page.py --check
	$(BIN)/python scripts/command_pages.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m build --wheel --outdir dist

# compile every Triton kernel with the oldest and the newest Triton; no GPU is needed
kernels: $(STAMP) $(OLD)/.installed
	$(OLD)/bin/python scripts/kernels.py
	$(BIN)/python scripts/kernels.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

overhead: $(STAMP)
	$(BIN)/python benchmarks/overhead.py

# all CPU benchmarks and the figures; takes about half an hour on two idle cores
benchmarks: $(STAMP)
	for script in overhead models scaling attention ops training; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/plot.py

# GPU benchmarks: the run of 300 s first, then the long ones; benchmarks/gpu.py lists the requirements
benchmarks-gpu:
	$(PYTHON) benchmarks/gpu.py
	for script in attention ops models training scaling; do $(PYTHON) benchmarks/$$script.py --device cuda --dtype bfloat16 || exit 1; done

# (a comma would end the argument of a call)
comma := ,
$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),--constraint constraints.txt --editable ".[dev$(comma)dev-interop]")
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(OLD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
