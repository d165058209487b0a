# minimuse from a fresh clone. You need make and Python 3.11 or newer; the targets create .venv.
PYTHON ?= python3
PROMPT ?= a large red cube
OUT    ?= demo.png
# On Linux, TORCH_BACKEND=cpu avoids the CUDA build of torch (several GB). All values of `uv --torch-backend` work.
TORCH_BACKEND ?=
# Tests run in this number of processes, with one thread each.
WORKERS ?= 2

BIN    := .venv/bin
STAMP  := .venv/.installed
DEV    := .venv/.installed-dev
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test fast coverage lint format notebooks site train clean

help:  ## show this list
	@echo "make TARGET, one of:"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-9s %s\n", $$1, $$2}' Makefile
	@echo 'settings: PYTHON=python3.12  TORCH_BACKEND=cpu  PROMPT="two small red cubes"  OUT=demo.png  WORKERS=4'

install: $(DEV)  ## create .venv with everything: drawing, tests, notebooks

# What drawing and training need. The stamp is written last, so an interrupted or outdated installation is repeated.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minimuse needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another Python: make PYTHON=python3.12 ..."; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_BACKEND),)
	$(BIN)/python -m pip install uv
	$(BIN)/python -m uv pip install --python $(BIN)/python "$$(grep '^torch==' requirements.txt)" --torch-backend $(TORCH_BACKEND)
endif
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# What tests, notebooks and assignments need in addition.
$(DEV): $(STAMP) requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

demo: $(STAMP)  ## draw PROMPT with a shipped checkpoint into OUT, with a film of its decoding
	@$(BIN)/minimuse generate "$(PROMPT)" --out "$(OUT)" --seed 0 --film --force
	@echo "The picture of \"$(PROMPT)\" is in $(OUT)."

test: $(DEV)  ## run all tests
	$(PYTEST)

fast: $(DEV)  ## run the tests that are not marked slow
	$(PYTEST) -m "not slow"

coverage: $(DEV)  ## run all tests and list the lines that no test runs
	$(PYTEST) --cov --cov-report=term-missing

lint: $(DEV)  ## check rules and format with ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(DEV)  ## fix rules and format with ruff
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

notebooks: $(DEV)  ## build the course's notebooks from their sources and run them in full
	$(BIN)/python notebooks/build.py

site: $(DEV)  ## write the course as HTML pages and slides into site/; works offline
	$(BIN)/python notebooks/pages.py

train: $(STAMP)  ## train the nano preset from scratch into runs/nano
	$(BIN)/minimuse train nano --out runs/nano

clean:  ## remove .venv and the files of tools; runs/ and pictures stay
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
