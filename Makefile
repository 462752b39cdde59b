# The same few commands for people and CI. On a fresh machine with Python 3.11 or newer, `make demo` is all there is to type.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_CHECK := $(BIN)/python docs/reference.py --check
BENCHMARKS := $(sort $(wildcard tests/benchmarks/bench_*.py))

.PHONY: demo test test-long lint bench clean

demo: $(INSTALLED)
	$(BIN)/lorafleet simulate quickstart

test: $(INSTALLED)
	$(BIN)/pytest -m "not long"

test-long: $(INSTALLED)
	$(BIN)/pytest -m long -o faulthandler_timeout=0
	$(BIN)/pytest -m "not long" --hypothesis-profile=thorough tests/property

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(DOCS_CHECK)

bench: $(INSTALLED)
	@set -e; for program in $(BENCHMARKS); do echo "== $$program"; $(BIN)/python $$program; done

clean:
	rm -rf .venv build dist *.egg-info .cache .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: with its version settled, pip takes a CPU build where one is at hand.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'LoRAFleet needs Python 3.11 or newer; $(PYTHON) is not. Name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2; }
	@echo 'installing into .venv: a few minutes the first time'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt 'torch~=2.13.0'
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
