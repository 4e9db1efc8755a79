# Two commands for a newcomer: `make demo` and `make test`. `make help` lists the rest.
#
# Needs Linux x86-64 and Python 3.11 or 3.12; everything else goes into .venv from a complete lock.
# LOCK=requirements/cpu.txt (or cuda.txt) overrides the choice; PYTHON=/path/to/python names an interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?=
LOCK ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo requirements/cuda.txt || echo requirements/cpu.txt)
BIN := .venv/bin
WORKSPACE ?= demo

.PHONY: help venv demo test check lint lock bench bench-quantize bench-damage bench-client bench-draft bench-verdict bench-prediction bench-verify clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

# The stamp is written last and holds a hash of what was installed: a half-made environment has none and is
# made anew, an unchanged lock is not installed again.
venv:  ## make .venv if it is missing or the lock has changed
	@want=$$(cat $(LOCK) pyproject.toml | sha256sum | cut -d' ' -f1)
	if [ "$$(cat .venv/.installed 2>/dev/null || true)" = "$$want" ]; then exit 0; fi
	if [ ! -e .venv/.installed ]; then
	  python=
	  for candidate in $(PYTHON) python3.11 python3.12 python3 python; do
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	        2>/dev/null; then python=$$candidate; break; fi
	  done
	  if [ -z "$$python" ]; then
	    echo "error: no Python 3.11 or 3.12 (with venv) found" >&2
	    echo "what to do: install one (Debian: apt install python3.11-venv; or: uv python install 3.11)," >&2
	    echo "            or name it: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2
	    exit 2
	  fi
	  echo "making .venv with $$($$python --version) from $(LOCK), about two minutes ..." >&2
	  rm -rf .venv
	  "$$python" -m venv .venv
	else
	  echo "$(LOCK) or pyproject.toml has changed: bringing .venv up to date ..." >&2
	  rm .venv/.installed
	fi
	install="$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps"
	torch=$$(grep -E '^torch==[0-9.]+\+cpu' $(LOCK) || true)
	if [ -n "$$torch" ]; then
	  # The CPU build is not on PyPI: from where pip is told to look, else from where uv knows it to be.
	  $$install "$$torch" 2>/dev/null || {
	    $$install "$$(grep '^uv==' $(LOCK))"
	    $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --torch-backend cpu "$$torch" || {
	      echo "error: no CPU build of $$torch for $$($(BIN)/python --version) was found" >&2
	      echo "what to do: let pip see a folder or index that has it (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL)," >&2
	      echo "            or name another interpreter: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.11" >&2
	      exit 6
	    }
	  }
	fi
	$$install -r $(LOCK)
	$$install --no-build-isolation -e .
	echo "$$want" > .venv/.installed

demo: venv  ## the whole release of the nano model, end to end, on this machine
	@exec $(BIN)/packager release recipes/nano.yaml --workspace $(WORKSPACE)

# Two processes of one thread each: two of two threads wait for one another at every barrier. Engines come after,
# one at a time.
test: venv  ## every test this machine can run
	@failed=0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not engine" || failed=1
	$(BIN)/python -m pytest -q -m engine || failed=1
	exit $$failed

check: lint  ## before each commit: lint and the quick tests
	@OMP_NUM_THREADS=1 exec $(BIN)/python -m pytest -q -n 2 -m "not slow and not engine" --ignore tests/test_layers.py

lint: venv  ## ruff, mypy --strict, the layer test
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

# Where the CPU build of torch comes from: a local wheel folder if pip is given one, else where uv knows it.
CPU_TORCH = $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)
COMPILE = $(BIN)/uv pip compile --quiet pyproject.toml --python-version 3.11 --extra quantize --extra draft --extra hubs \
	--extra sigstore --extra validate --extra nano --extra dev --no-emit-index-url --no-emit-find-links --no-annotate --no-header

lock: venv  ## resolve pyproject.toml into requirements/cpu.txt and cuda.txt
	@$(COMPILE) $(CPU_TORCH) --extra serve-cpu --override requirements/overrides-cpu.txt -o requirements/cpu.txt
	$(COMPILE) --extra serve --override requirements/overrides-cuda.txt -o requirements/cuda.txt

bench: venv  ## quantization throughput on 3 GB against cp, as a ratio of one run
	@exec $(BIN)/python benchmarks/quantize.py

bench-quantize: venv  ## the same on 12 GB and against llm-compressor: 15 minutes, 35 GB of disk
	@exec $(BIN)/python benchmarks/quantize.py --gigabytes 12 --llmcompressor

bench-damage: venv  ## which checks see planted damage: four servers of the nano in turn, some minutes
	@exec $(BIN)/python benchmarks/planted_damage.py

bench-client: venv  ## throughput through our client against `vllm bench serve` on one server
	@exec $(BIN)/python benchmarks/client_overhead.py

bench-draft: venv  ## training of a draft against a loop over speculators' parts, as a ratio of one run: 3 minutes
	@exec $(BIN)/python benchmarks/draft_training.py

bench-prediction: venv  ## held-out errors of the calibrated bound on this machine: two minutes
	@exec $(BIN)/python benchmarks/prediction.py

bench-verdict: venv  ## coverage of intervals, false alarms and power of the gate, by simulation: a minute
	@OMP_NUM_THREADS=1 exec $(BIN)/python benchmarks/verdict.py

bench-verify: venv  ## `packager verify` on 3 GB against sha256sum on as many cores, as a ratio of one run: a minute
	@exec $(BIN)/python benchmarks/verify.py

clean:  ## remove the demo workspace, caches and builds (keeps .venv)
	@rm -rf demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
