# Two commands: `make gate` and `make test`. Each sets up what it needs on a machine that has Python, git and make.
# PYTHON=...       the interpreter to use, instead of the one that .ci/python finds or sets up
# PYTEST_ARGS=...  further arguments for pytest, such as --require-gpu or -n 2

SHELL := bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help gate test clock lint format setup clean distclean

PYTHON ?=
PYTEST_ARGS ?=
# A recipe's first line of shell: the interpreter, found or set up.
with_python = set -euo pipefail; python=$$(PYTHON='$(PYTHON)' bash .ci/python)
ruff_pin = $(lastword $(subst ==, ,$(shell grep '^ruff==' constraints.txt)))
# Another version of ruff would format differently, so only the pinned one judges; without it, one line says so.
with_ruff = found=$$("$$python" -m ruff --version 2>/dev/null || echo "no ruff"); \
	if [[ $$found != "ruff $(ruff_pin)" ]]; then \
		echo "format and lint skipped: $$python has $$found, and ruff $(ruff_pin) is needed"; \
	else ( set -x; $(1) ); fi
# mypy reads the types of one set of pins, those of Python 3.11; elsewhere one line says so.
mypy_pin = $(shell sed -n 's/^mypy==\([^ ;]*\).*/\1/p' constraints.txt)
with_mypy = found=$$("$$python" -m mypy --version 2>/dev/null || echo "no mypy"); \
	if [[ $$found != "mypy $(mypy_pin) "* ]]; then \
		echo "types skipped: $$python has $$found, and mypy $(mypy_pin) is needed"; \
	else ( set -x; "$$python" -m megaproof.tests.support.typecheck ); fi
# Its package has no __main__, and its command need not be on the PATH.
clang_format = "$$python" -c "from clang_format import clang_format; clang_format()"
clang_format_pin = $(shell sed -n 's/^clang-format==//p' constraints.txt)
with_clang_format = found=$$($(clang_format) --version 2>/dev/null || echo "no clang-format"); \
	if [[ $$found != "clang-format version $(clang_format_pin)"* ]]; then \
		echo "form of the CUDA sources skipped: $$python has $$found, and clang-format $(clang_format_pin) is needed"; \
	else ( set -x; $(clang_format) $(1) $(cuda_sources) ); fi
cuda_sources = $(sort $(shell find kernel quant -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.hpp'))
# A run's record is asked besides its status: it has to be of this very run, and to hold every selected test.
nonce := $(shell od -An -N8 -tx1 /dev/urandom | tr -d ' ')
with_record = export MEGAPROOF_NONCE=$(nonce); \
	trap 's=$$?; set +x; (( s )) || "$$python" -m megaproof.proof ended $(nonce) || exit 1' EXIT
check = "$$python" -m ruff format --check . && "$$python" -m ruff check .
fix = "$$python" -m ruff check --fix . && "$$python" -m ruff format .

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18

gate:  ## the gate: every dsv4_flash case at 8 ranks
	@$(with_python); $(with_record); set -x; "$$python" -m pytest -k dsv4_flash --ranks 8 --require-pinned $(PYTEST_ARGS)

test:  ## formatting, lint, types and the whole suite, on two workers where pytest-xdist is installed
	@$(with_python); $(call with_ruff,$(check)); $(call with_clang_format,--dry-run -Werror); \
	$(with_mypy); workers=$$("$$python" -c 'import xdist' 2>/dev/null && echo "-n 2" || true); \
	$(with_record); set -x; "$$python" -m pytest $$workers $(PYTEST_ARGS)

clock:  ## the tests that real time could decide, 100 times on a machine that is kept busy
	@$(with_python); set -x; "$$python" -m megaproof.tests.support.busy --times 100 --burn 4

lint:  ## formatting, lint and types, checked only
	@$(with_python); $(call with_ruff,$(check)); $(call with_clang_format,--dry-run -Werror); $(with_mypy)

format:  ## formatting and lint, put right
	@$(with_python); $(call with_ruff,$(fix)); $(call with_clang_format,-i)

setup:  ## only find or set up the interpreter, and print it
	@$(with_python); echo "$$python"

clean:  ## remove caches and what killed runs left
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis reports
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
	find . -name '.megaproof-*' -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove caches and the .venv that make set up
	@if [[ -e .venv && ! -e .venv/made-by-megaproof ]]; then echo ".venv is not make's own: left alone"; else rm -rf .venv; fi
