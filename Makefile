# The one entry to everything; `make help` lists it. Each target does the set-up it needs first
# (tools/setup.sh), which is instant when nothing changed since.
#
#   make test PYTHON=python3.12        the interpreter for a new .venv, else python3
#   make test PYTEST_ARGS="-k filter"  a part of the tests

SHELL := /bin/bash
PYTEST_ARGS ?=
VENV := .venv/bin
SET_UP := PYTHON='$(PYTHON)' tools/setup.sh

.DEFAULT_GOAL := help
.PHONY: help demo test test-next test-cuda consumers beside upstream fuzz san analyze lint bench
.PHONY: bench-accept bench-quick bench-report clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## set up, then load a real model twice, stock and patched, and compare
	@$(SET_UP)
	@$(VENV)/python benchmarks/demo.py

test: ## set up with warnings as errors, then run all of the following and every test
	@STX_WERROR=1 $(SET_UP)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory analyze
	@$(MAKE) --no-print-directory -j2 --output-sync=target SAN_TESTS='$(SAN_IN_CI)' $(BESIDE)
	@$(VENV)/python -m pytest $(PYTEST_ARGS) \
		$(if $(PYTEST_ARGS),,$(addprefix --ignore ,$(CONSUMERS) $(wildcard $(BESIDE_TESTS))))

# What takes about one processor each goes two at a time. The rest of the tests, most of those that
# look at memory, threads and the page cache, goes alone. With PYTEST_ARGS pytest gets all tests.
CONSUMERS := tests/test_consumers.py
BESIDE_TESTS := c cli* extract run autopatch doctor bench_cuda
BESIDE_TESTS := $(BESIDE_TESTS:%=tests/test_%.py)
BESIDE := fuzz san upstream test-next
BESIDE += $(if $(PYTEST_ARGS),,consumers beside)
beside: ## C programs, commands, extraction
	@$(SET_UP)
	@$(VENV)/python -m pytest -q $(BESIDE_TESTS)

consumers: ## the libraries that read safetensors, with and without the patch
	@$(SET_UP)
	@$(VENV)/python -m pytest -q $(CONSUMERS)

test-cuda: ## the tests that need a CUDA device
	@$(SET_UP)
	@$(VENV)/python -m pytest -m cuda

# Those tests that compare with stock, against the release that comes next.
NEXT_TESTS := parity slices storage bad_input header_errors patch patch_homes filter stats extract
test-next: ## the tests of being a drop-in, against the next safetensors
	@$(SET_UP) with-upstream
	@for site in .upstream/site-*; do \
		[ -d "$$site" ] || exit 1; \
		echo "against $$site"; \
		PYTHONPATH=$$site $(VENV)/python -m pytest -q $(NEXT_TESTS:%=tests/test_%.py) || exit 1; \
	done

upstream: ## safetensors' and transformers' own tests, with and without the patch
	@$(SET_UP) with-upstream
	@$(VENV)/python tools/upstream.py run

FUZZ_SECONDS := 60
fuzz: ## damaged files against stock, then libFuzzer on the header parser
	@$(SET_UP) with-clang
	@$(VENV)/python tests/fuzz/differential.py --seeds 1 2 3 4 5 --cases 10000
	@$(VENV)/python tools/fuzz.py $(FUZZ_SECONDS)

SAN_TESTS ?=
SAN_IN_CI := parity slices threads core_cases explain differential device
SAN_IN_CI := $(SAN_IN_CI:%=tests/test_%.py)
san: ## the tests with the extension under ASan and UBSan
	@$(SET_UP)
	@tools/san.sh $(SAN_TESTS)

analyze: ## clang-tidy's view of the C code
	@$(SET_UP) with-clang
	@$(VENV)/python tools/analyze.py

lint: ## style and types of the Python code, style of the C code
	@$(SET_UP) no-build
	@SECONDS=0; set -e; \
	$(VENV)/ruff check .; \
	$(VENV)/ruff format --check .; \
	$(VENV)/mypy; \
	$(VENV)/clang-format --dry-run -Werror csrc/*.[ch] csrc/*.cpp tests/c/*.[ch] \
		tests/fuzz/*.c; \
	echo "lint: done in $$SECONDS s"

BENCH_ARGS ?=
bench: ## set up, then measure everything: loads, other loaders, engines, libraries (hours)
	@$(SET_UP) with-peers
	@$(VENV)/python benchmarks/bench_load.py $(BENCH_ARGS) || true
	@$(VENV)/python benchmarks/bench_engines.py
	@$(VENV)/python benchmarks/bench_consumers.py
	@$(VENV)/python benchmarks/bench_open.py
	@$(VENV)/python benchmarks/report.py

bench-accept: ## set up, then measure what has to be reached; fails where it is not
	@$(SET_UP)
	@$(VENV)/python benchmarks/bench_load.py --accept $(BENCH_ARGS)

bench-quick: ## set up, then measure fewer cases, 3 rounds each
	@$(SET_UP)
	@$(VENV)/python benchmarks/bench_load.py --quick $(BENCH_ARGS) || true
	@$(VENV)/python benchmarks/bench_engines.py --quick
	@$(VENV)/python benchmarks/bench_consumers.py --quick

bench-report: ## the newest results as tables and a chart
	@$(VENV)/python benchmarks/report.py

clean: ## remove what was built, stamps and caches; .venv stays
	@rm -rf build dist *.egg-info stx_patch/*.so .stamps .fuzz .san .coverage htmlcov
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and .venv
	@rm -rf .venv .upstream .peers
