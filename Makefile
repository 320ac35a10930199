# make demo         train, test, look and classify, from a fresh clone (Python 3.11 or later and a network)
# make test         lint, types and all tests but the slow ones, on the locked releases of .ci/locked.txt
# make test-slow    the tests that take more than ten seconds each, on the same releases
# make test-latest  all tests, on the newest release of every package
# make test-oldest  all tests, on the oldest releases that pyproject.toml allows
# make page         build the page of the server from web/ into the package (needs Node 20.19 or later)
# make test-page    rebuild the page, compare it with what the package holds, and check its source
# make lint         ruff and mypy alone
# make format       let ruff mend what it can
# make tables       write the tables of README.md and docs/ again, from results/
# make docs         build the site of docs/ in docs/_build/html, without a network
# make notebook     run docs/quickstart.ipynb and store it with its outputs
# make parity       compare vitrail with timm, transformers and torchvision; resumes where it stopped; writes docs/parity.md
# make locks        write .ci/locked.txt and .ci/oldest.txt from pyproject.toml and what is published today

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
NEED_PYTHON := { echo "vitrail needs Python 3.11 or later with its venv module: install it, or say make PYTHON=/path/to/python" >&2; exit 2; }

# Each test process has one thread: two of them are quicker than one with two.
PYTEST := python -m pytest -q -n auto --maxprocesses=4
COMPILE := uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --quiet --no-header --no-annotate

# Tests that need real data read it from here, and say so when they skip.
ifneq ($(wildcard ../shared/data),)
export VITRAIL_DATA ?= $(abspath ../shared/data)
endif
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-latest test-oldest page test-page lint format tables docs notebook parity locks

demo: $(VENV)/installed
	$(BIN)/vitrail demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m "not slow"

# In three runs: a process that has run OpenVINO among much else may end by a segmentation fault (seen in 2026.4).
test-slow: $(VENV)/installed-dev
	@failed=0; for tests in tests/export tests/test_commands.py "--ignore=tests/export --ignore=tests/test_commands.py"; do \
		echo "the slow tests of $$tests"; \
		OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m slow $$tests || failed=1; \
	done; exit $$failed

test-latest: .venv-latest/installed
	OMP_NUM_THREADS=1 .venv-latest/bin/$(PYTEST)

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/$(PYTEST)

page: $(VENV)/installed-dev
	cd web && npm ci --no-audit --no-fund
	$(BIN)/python web/openapi.py
	cd web && npm run client && npm run check && npm run build

# The build is the same to the byte wherever it is made.
test-page:
	rm -rf build/page && mkdir -p build/page
	cp -r src/vitrail/serve/page web/openapi.json web/src/api/schema.ts build/page
	$(MAKE) page
	diff -r build/page/page src/vitrail/serve/page
	diff build/page/openapi.json web/openapi.json
	diff build/page/schema.ts web/src/api/schema.ts

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(VENV)/installed
	$(BIN)/python docs/tables.py

docs: $(VENV)/installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

notebook: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebook.py

parity: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/parity.py
	$(BIN)/python docs/tables.py

locks: $(VENV)/installed-dev
	$(BIN)/pip install --quiet uv
	$(BIN)/$(COMPILE) --upgrade --output-file .ci/locked.txt
	$(BIN)/$(COMPILE) --upgrade --resolution lowest-direct --output-file .ci/oldest.txt

# The stamps tell when the last installation was; a newer pyproject.toml or lock installs again.
$(VENV)/installed: pyproject.toml .ci/locked.txt | $(BIN)/pip
	@echo "Installing vitrail; the first time this downloads PyTorch, some gigabytes."
	$(BIN)/pip install -c .ci/locked.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml .ci/locked.txt | $(BIN)/pip
	@echo "Installing vitrail and what its tests need; the first time this downloads PyTorch, some gigabytes."
	$(BIN)/pip install -c .ci/locked.txt -e '.[all,dev]'
	@touch $(VENV)/installed $@

# What is newest changes from day to day, so these are resolved each time.
.PHONY: .venv-latest/installed
.venv-latest/installed: | .venv-latest/bin/pip
	.venv-latest/bin/pip install --upgrade --upgrade-strategy eager -e '.[all,dev]'

.venv-oldest/installed: pyproject.toml .ci/oldest.txt | .venv-oldest/bin/pip
	.venv-oldest/bin/pip install -c .ci/oldest.txt -e '.[all,dev]'
	@touch $@

%/bin/pip:
	@test -n "$(PYTHON)" || $(NEED_PYTHON)
	$(PYTHON) -m venv $*
