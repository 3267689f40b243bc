# Every target makes .venv and installs what it needs by itself, from python3, make and a C++ compiler.
# Without a compiler everything runs too, on the reference ops.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
CPP := $(wildcard $(addprefix csrc/,*.h *.cpp */*.h */*.cpp */*.cuh */*.cu) \
  examples/cpp/*.cpp tests/kernels/*.h tests/kernels/*.cpp)
NATIVE := $(wildcard setup.py csrc/* csrc/*/*)

.PHONY: demo test quick bench lint format docs clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/talos demo --out demo --overwrite

# One thread a worker: two workers with two threads each would wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# Before each commit, in under 90 seconds: two cases of each test that is not slow.
quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" --quick tests

bench: $(STAMP)
	$(BIN)/python -m pytest -q benches/

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/typos
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# Pages, docstrings and --help texts as a site; a broken link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build demo site *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache $(STAMP)
	rm -f talos_kernels/*.so
	find talos talos_kernels benches examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first, because setup.py asks it for its headers.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "python must be 3.11 or newer, got $$($(PYTHON) --version 2>&1);" \
	       "name one with: make PYTHON=python3.11"; exit 2; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) must come with venv and ensurepip, got one without;" \
	       "on Debian and Ubuntu: apt-get install python3-venv"; exit 2; } >&2
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy setuptools wheel ninja
	$(INSTALL) --no-build-isolation -e ".[dev,demo]"
	@touch $@
