# Each target installs what it needs into .venv. `make demo` needs two CPU cores and 8 GiB.
# SEED and OUT may be given: make demo SEED=1 OUT=runs/demo1. It runs on a GPU or TPU where there is
# one (ACCELERATOR=cuda or tpu, found below); `make demo ACCELERATOR=` stays on the CPU.
# PIP="uv pip" installs with uv.
PYTHON ?= python3
SEED ?= 0
OUT ?= runs/demo
PIP ?= $(VENV)/python -m pip
ON_GOOGLE := $(shell grep -s Google /sys/class/dmi/id/product_name)
ACCELERATOR ?= $(if $(shell nvidia-smi -L 2>/dev/null),cuda,$(if $(and $(ON_GOOGLE),$(wildcard \
  /dev/accel0 /dev/vfio/0)),tpu))
# By default glibc returns large buffers to the kernel after every step and faults them in again,
# page by page: about 40 000 page faults per second in training, about 10 with these settings.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export MALLOC_ARENA_MAX ?= 1
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592
ifeq ($(ACCELERATOR),)
# Without it, an installed libtpu searches for chips and fills the log with errors.
demo: export JAX_PLATFORMS ?= cpu
# Small programs compile faster at level 2 and run as fast as at level 3 (0.25 s and 0.28 s a step).
demo: export XLA_FLAGS ?= --xla_backend_optimization_level=2
else  # one device: the demo's steps have one or two rows
demo: export CUDA_VISIBLE_DEVICES ?= 0
demo: export TPU_VISIBLE_CHIPS ?= 0
demo: export TPU_PROCESS_BOUNDS ?= 1,1,1
demo: export TPU_CHIPS_PER_PROCESS_BOUNDS ?= 1,1,1
endif
# Tests compare with figures of CPUs, on eight virtual devices.
test test-slow test-gpu-compile test-real fuzz: export JAX_PLATFORMS ?= cpu

VENV := .venv/bin
RUN := .venv/.run-installed
RUN_ACCELERATED := $(if $(ACCELERATOR),.venv/.$(ACCELERATOR)-installed)
TEST := .venv/.test-installed
GPU := .venv/.gpu-compile-installed

.PHONY: demo test test-slow test-gpu-compile test-real fuzz lint clean

demo: $(RUN) $(RUN_ACCELERATED)
	$(VENV)/python -m fastslm_jax.demo --out=$(OUT) --seed=$(SEED)

test: $(TEST)
	$(VENV)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# Whole trainings, and every command of the documentation.
test-slow: $(TEST)
	$(VENV)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

# Compiles train steps and generation for GPUs, without one (1.7 GB of wheels).
test-gpu-compile: $(GPU)
	$(VENV)/python -m pytest -m gpu_compile $(ARGS)

# Pretrained weights and recordings of people (tests/real/test_real.py says which): FASTSLM_REAL=DIR.
test-real: $(TEST)
	@test -n "$(FASTSLM_REAL)" || { echo "error: name the folder: make test-real FASTSLM_REAL=DIR"; exit 2; }
	FASTSLM_REAL="$(FASTSLM_REAL)" $(VENV)/python -m pytest --noconftest -rP tests/real $(ARGS)

# Mutated files of all kinds (tests/test_fuzz.py): minutes.
fuzz: $(TEST)
	FASTSLM_FUZZ=12000 $(VENV)/python -m pytest -n 2 --dist load tests/test_fuzz.py $(ARGS)

lint: $(TEST)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

clean:
	rm -rf .venv runs corpus .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: Python 3.11 to 3.13 is required: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install -q --upgrade pip

$(RUN): requirements.txt requirements-demo.txt | $(VENV)/python
	$(PIP) install -q -r requirements.txt -r requirements-demo.txt
	touch $@

.venv/.%-installed: pyproject.toml | $(RUN)
	$(PIP) install -q -e .[$*]
	touch $@

$(TEST): requirements.txt requirements-demo.txt requirements-test.txt | $(VENV)/python
	$(PIP) install -q -r requirements-test.txt
	touch $@ $(RUN)

$(GPU): $(TEST) pyproject.toml
	$(PIP) install -q -e .[plan-gpu]
	touch $@
