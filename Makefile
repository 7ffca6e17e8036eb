# make install   a virtual environment in .venv with everything in it, editable
# make demo      the main job: worker_spi on a PostgreSQL of its own, until Ctrl-C
# make test      every test of every distribution;  make test ARGS="-k stop"
# make lint      ruff and mypy
#                JOBS tests run side by side: most of them wait for processes most of the time
#
# PYTHON names another interpreter (3.11 or newer), VENV another folder: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 4

# hatchling and editables build the distributions; they are installed like the rest, so that they are pinned like the rest.
TOOLS := editables hatchling hypothesis mypy packaging pytest pytest-timeout pytest-xdist ruff
PACKAGES := host/bghost plugins/bghost-postgres/bghost_postgres contrib/worker_spi/bghost_worker_spi contrib/test_shm_mq/bghost_test_shm_mq docs/examples/counter/bghost_counter
TESTS := $(wildcard host/tests plugins/*/tests contrib/*/tests tests)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/installed

.PHONY: install demo test lint

install: $(STAMP)

$(STAMP): Makefile constraints.txt host/pyproject.toml $(wildcard plugins/*/pyproject.toml contrib/*/pyproject.toml)
	@.ci/check-python '$(PYTHON)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear '$(VENV)'
	@echo 'installing into $(VENV) ...'
	@$(PIP) install --constraint constraints.txt $(TOOLS)
	@$(PIP) install --constraint constraints.txt --no-build-isolation \
		--editable host --editable 'plugins/bghost-postgres[embedded]' --editable contrib/worker_spi \
		--editable contrib/test_shm_mq
	@touch $@

demo: install
	@$(BIN)/bghost run worker_spi worker_spi_feed --instance demo --set worker_spi.naptime=1 --set postgres.embedded=always

test: install
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# The packages at once; each folder of tests by itself, since their conftest.py have one name.
lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(PACKAGES) .ci/left_over.py
	@for folder in $(TESTS); do echo "mypy $$folder"; $(BIN)/mypy --explicit-package-bases $$folder || exit; done
