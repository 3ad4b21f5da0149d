# Every target does the set-up it needs; a fresh machine needs Python 3.11-3.13, pip and make only.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# What we start ourselves does not phone home (README, "Privacy").
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
# FAISS build to install: cpu or gpu.
FAISS ?= cpu
# Whole pipelines, minutes each; `make test` runs all others.
SLOW_TESTS := tests/test_killed_run.py tests/test_proof_recipes.py

.PHONY: setup quickstart test test-slow test-chaos check lint format types lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: Tessera needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)" \
	    "(name another one: make setup PYTHON=python3.12)" >&2; exit 2; }
	@command -v uv >/dev/null 2>&1 || $(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
	@UV="$$(command -v uv || echo '$(PYTHON) -m uv')"; set -e; \
	  [ -d .venv ] || $$UV venv --quiet --python $(PYTHON) .venv; \
	  $$UV pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	  $$UV pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(STAMP)

quickstart: setup
	$(BIN)/tessera run configs/quickstart.yaml

# In two processes, one of which gets the tests on Ray (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n 2 -m "not chaos" $(SLOW_TESTS:%=--ignore=%)

test-slow: setup
	$(BIN)/python -m pytest $(SLOW_TESTS)

# One process: every test has the machine, and often a cluster, to itself.
test-chaos: setup
	$(BIN)/python -m pytest -m chaos

lint: setup
	$(BIN)/ruff check .

format: setup
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint format types test

lock:
	uv pip compile --universal --generate-hashes --no-annotate --no-header --no-emit-index-url \
	  --python-version 3.11 --extra $(FAISS) --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .tessera build *.egg-info
