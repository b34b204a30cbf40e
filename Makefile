# The newest python3.11 at hand, else python3; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed
TEST_STAMP := .venv/.installed-test
SIDE_BY_SIDE := --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
# On a CPU, huge pages spare a train step most of its page faults; elsewhere this does nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help .venv demo dictionary dictionary-plain passkey test test-slow lint format clean

help:  ## Show this list.
	@sed -n 's/^\([a-z.-]*\):[^#]*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-23s %s\n", $$1, $$2 }'

.venv: $(TEST_STAMP)  ## Make the virtual environment, with all that the tests need; again when requirements change.

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: fot needs Python 3.11 or newer and '$(PYTHON)' is not: run 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,seqio]'
	@touch $@

demo: $(STAMP)  ## Train and evaluate a small Focused Transformer, at most 20 minutes on 2 cores; results in runs/demo.
	$(BIN)/python -m fot.demo --config=configs/demo.py --workdir=runs/demo

dictionary: $(STAMP)  ## Train dictionary lookup and evaluate it up to 1M tokens of memory; results in runs/dictionary_tiny.
	$(BIN)/python -m fot.train --config=configs/dictionary_tiny.py --workdir=runs/dictionary_tiny
	$(BIN)/python -m fot.evaluate dictionary --workdir=runs/dictionary_tiny

dictionary-plain: dictionary  ## The same with a plain transformer beside it, trained as long; results in the same folder.
	$(BIN)/python -m fot.train --config=configs/dictionary_plain.py --workdir=runs/dictionary_plain
	$(BIN)/python -m fot.evaluate dictionary --workdir=runs/dictionary_tiny --plain=runs/dictionary_plain

passkey: $(STAMP)  ## Train passkey retrieval and evaluate it in prompts of up to 64k tokens; results in runs/passkey_tiny.
	$(BIN)/python -m fot.train --config=configs/passkey_tiny.py --workdir=runs/passkey_tiny
	$(BIN)/python -m fot.evaluate passkey --workdir=runs/passkey_tiny

test: $(TEST_STAMP) lint  ## Lint, and run every test that isn't slow, files side by side.
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

test-slow: $(TEST_STAMP)  ## Run the slow tests alone, files side by side.
	$(BIN)/python -m pytest -m slow $(SIDE_BY_SIDE)

lint: $(TEST_STAMP)  ## Check lint rules and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TEST_STAMP)  ## Mend lint and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment, builds and caches; runs/ stays.
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
