# make demo    train, test, look and classify, from a fresh clone (Python 3.11 or later and a network)
# make test    lint, types and tests
# make lint    ruff and mypy alone
# make format  let ruff mend what it can
# make tables  write the tables of README.md and docs/ again, from results/
# make parity  every architecture of timm's ViT modules against ours; goes on where it stopped, then writes docs/parity.md
# make constraints  write .ci/constraints.txt from what is installed

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Tests that need real data read it from here, and say so when they skip.
ifneq ($(wildcard ../shared/data),)
export VITRAIL_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo test lint format tables parity constraints

demo: $(VENV)/installed
	$(BIN)/vitrail demo

# Each test process has one thread: two of them are quicker than one with two.
test: $(VENV)/installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(VENV)/installed
	$(BIN)/python docs/tables.py

parity: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/parity.py
	$(BIN)/python docs/tables.py

constraints: $(VENV)/installed-dev
	$(BIN)/pip freeze --exclude vitrail > .ci/constraints.txt.new
	mv .ci/constraints.txt.new .ci/constraints.txt

# The stamps hold when the last installation was; a newer pyproject.toml installs again.
$(VENV)/installed: pyproject.toml | $(BIN)/pip
	@echo "Installing vitrail; the first time this downloads PyTorch, some gigabytes."
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing vitrail and what its tests need; the first time this downloads PyTorch, some gigabytes."
	$(BIN)/pip install -e '.[all,dev]'
	@touch $(VENV)/installed $@

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "vitrail needs Python 3.11 or later with its venv module: install it, or say make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
