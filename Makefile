# Every target sets up what it needs. With VENV (default .venv) that is a virtual environment in this
# checkout; with VENV= it is PYTHON itself, which must have torch already: nothing is downloaded or installed.
#   make demo | test | bench | lint | gpu-test | gpu-bench [OUT=dir] [BUDGET=seconds]
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
OUT ?= build/results
BUDGET ?= 480
BENCHES ?= conv_relu_pool attention lstm conv_transpose_act linear_act

CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)
MODULES := pyproject.toml $(shell find pyops triton_kernels -name '*.py' 2>/dev/null)

ifneq ($(VENV),)
  PY := $(VENV)/bin/python
  READY := $(VENV)/.built
  RUN := $(PY)
else
  PY := $(PYTHON)
  READY := build/site/.built
  # The build's own copy of the package, not the sources in the current directory.
  RUN := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/site$${PYTHONPATH:+:$$PYTHONPATH} $(PY)
endif

.PHONY: demo test bench lint format gpu-test gpu-bench build clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(RUN) -m pyops demo

# One process a core where pytest-xdist is installed, as in .venv; all in one where it is not.
test: $(READY)
	$(RUN) -m pytest -q $$($(RUN) -c "import importlib.util as u; print('-n auto --maxprocesses 8 --dist worksteal' * bool(u.find_spec('xdist')))")

bench: $(READY)
	@status=0; for op in $(BENCHES); do $(RUN) -m pyops bench $$op --backward both --out $(OUT) || status=1; done; exit $$status

build: $(READY)

gpu-test: $(READY)
	@mkdir -p $(OUT)
	@$(RUN) -c "import torch; raise SystemExit(None if torch.cuda.is_available() else 'gpu-test: no CUDA GPU here')"
	$(RUN) -m pytest -q -m gpu --junitxml=$(OUT)/gpu-test.xml --proof=$(OUT)/gpu-test.json

gpu-bench: $(READY)
	@status=0; for op in $(BENCHES); do \
	  $(RUN) -m pyops bench $$op --device cuda --backward both --out $(OUT) --budget $$(($(BUDGET) / $(words $(BENCHES)))) || status=1; \
	done; exit $$status

lint: $(VENV)/.packages
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.packages
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist .venv *.egg-info pyops/*.so

$(VENV)/.packages: pyproject.toml Makefile
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)" setuptools wheel ninja pybind11 "numpy<2.4"
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q "$(TRITON)"
	$(PY) -m pip install -q --no-build-isolation -e ".[test,lint]"
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@

build/site/.built: $(SOURCES) $(MODULES)
	$(PY) setup.py -q build --build-lib build/site
	touch $@
