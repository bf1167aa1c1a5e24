# make demo · make test · make check · make bench: the first use creates .venv and installs.
#
# PYTHON=python3.12        another interpreter (3.11 or later)
# TORCH_INDEX=URL          where pip finds PyTorch's CPU wheels, if your index offers only the CUDA build
# CUDA=1                   install the CUDA build although no NVIDIA device is in sight

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test check format bench clean

demo: $(VENV)/installed
	$(BIN)/twinlora demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/tables.py

$(VENV)/torch: constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, found $$($(PYTHON) --version): make PYTHON=python3.11"; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version) and installing PyTorch"
	"$(PYTHON)" -m venv $(VENV)
ifndef CUDA
	@if ! command -v nvidia-smi >/dev/null && $(PIP) --quiet --dry-run --report - torch | grep -q '"name": "nvidia-'; then \
	  echo "No NVIDIA device is here, but pip would install the CUDA build of torch (several GB)."; \
	  echo "Give the index of PyTorch's CPU wheels: make TORCH_INDEX=URL (PyTorch's install page shows it), or CUDA=1"; \
	  exit 1; fi
endif
	$(PIP) torch
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml CMakeLists.txt $(wildcard src/twinlora/numerics/csrc/*)
	@echo "installing twinlora"
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what tests and checks need"
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
