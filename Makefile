# Two commands do all the set-up on a machine that has Python 3.11 or newer and make:
#   make demo   virtual environment, installation, the main job
#   make test   the same set-up, then every test
# Their plain pip equivalents stand in README.md.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# byte code is made when a module is first imported: of the modules installed, most never are, and making it takes over a minute;
# it is kept then, also where the environment of a container says otherwise: or each process would make it anew
unexport PYTHONDONTWRITEBYTECODE

# $(call install,folder,requirements): uv unpacks in a fifth of the time that pip needs; where only pip knows the index, pip does it
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip uv
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) \
		|| $(1)/bin/python -m pip install --quiet --no-compile $(2)
endef

# the oldest versions that pass, in an environment of their own
OLD := .venv-oldest
# (the interpreter of its Triton, 3.6, cannot run with a newer NumPy)
OLDEST := torch==2.11.0 torchvision==0.26.0 timm==1.0.26 transformers==5.17.0 open_clip_torch==3.3.0 accelerate==1.12.0 numpy==2.3.5

.PHONY: demo test test-fast test-oldest check kernels docs overhead benchmarks benchmarks-gpu clean

demo: $(STAMP)
	$(BIN)/tokenmerge demo

# one thread for each of two processes: with two each, they wait for one another half of the time (three processes are no faster)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# every kind of block and head: all names of timm, which differ in sizes alone, run with the newest versions, and so do tests of what is
# Python alone or tokenmerge's own tools
NEWEST_ONLY := test_layout test_config test_schedule tools/test_benchmarks tools/test_break_even tools/test_compare tools/test_docs tools/test_sounds \
	tools/test_videos tools/test_tools
test-oldest: $(OLD)/.installed
	OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" \
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
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m build --wheel --outdir dist

# every Triton kernel, compiled for GPUs that need not be here, by the oldest and the newest Triton
kernels: $(STAMP) $(OLD)/.installed
	$(OLD)/bin/python scripts/kernels.py
	$(BIN)/python scripts/kernels.py

docs: $(STAMP)
	$(BIN)/mkdocs serve

overhead: $(STAMP)
	$(BIN)/python benchmarks/overhead.py

# every benchmark that a CPU can run, and the figures; about half an hour on two cores that do nothing else
benchmarks: $(STAMP)
	for script in overhead models scaling attention ops training; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/plot.py

# on a GPU, for people with time: the prepared run of 300 s first, then the long ones; what they need is said in benchmarks/gpu.py
benchmarks-gpu:
	$(PYTHON) benchmarks/gpu.py
	for script in attention ops models training scaling; do $(PYTHON) benchmarks/$$script.py --device cuda --dtype bfloat16 || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),--constraint constraints.txt --editable ".[dev,dev-interop]")
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(OLD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
