# minimuse from a fresh clone: only make and Python 3.11+ are needed; every target makes .venv first.
PYTHON ?= python3
PROMPT ?= a large red cube
OUT    ?= demo.png
# On Linux, TORCH_BACKEND=cpu spares the CUDA build of torch (several GB); any value of `uv --torch-backend` works.
TORCH_BACKEND ?=

BIN   := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test fast coverage lint format notebooks train clean

help:  ## show this list
	@echo "make TARGET, one of:"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-9s %s\n", $$1, $$2}' Makefile
	@echo 'settings: PYTHON=python3.12  TORCH_BACKEND=cpu  PROMPT="two small red cubes"  OUT=demo.png'

install: $(STAMP)  ## make .venv with the pinned versions and minimuse itself

# The stamp is written last: a .venv that is half made, or older than the pins, is installed again over itself.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minimuse needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Point make at another one: make PYTHON=python3.12 ..."; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_BACKEND),)
	$(BIN)/python -m pip install uv
	$(BIN)/python -m uv pip install --python $(BIN)/python "$$(grep '^torch==' requirements.txt)" --torch-backend $(TORCH_BACKEND)
endif
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## draw PROMPT with the shipped checkpoint into OUT, with the film of its decoding
	@$(BIN)/minimuse generate "$(PROMPT)" --out "$(OUT)" --seed 0 --film --force
	@echo "The picture of \"$(PROMPT)\" is in $(OUT)."

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

fast: $(STAMP)  ## the tests that take a few minutes together
	$(BIN)/python -m pytest -m "not slow"

coverage: $(STAMP)  ## all tests, with the lines that none of them runs
	$(BIN)/python -m pytest --cov --cov-report=term-missing

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)  ## ruff: mend what can be mended
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

notebooks: $(STAMP)  ## build the course's notebooks from their sources and execute them all, in full
	$(BIN)/python notebooks/build.py

train: $(STAMP)  ## train the nano preset from nothing into runs/nano
	$(BIN)/minimuse train nano --out runs/nano

clean:  ## remove .venv and what tools leave behind; runs/ and pictures stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
