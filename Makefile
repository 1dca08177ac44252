# The only commands anyone needs. The first run makes .venv and builds; later ones reuse what is there.

# Several environments side by side: make test PYTHON=python3.12 TORCH='torch==2.10.*' VENV=.venv312
PYTHON ?= python3
TORCH := torch
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name 'Cargo.toml')
PATHS := python tests benchmarks examples tools
DIST := dist
BUILDER := target/maturin
MATURIN := $(firstword $(wildcard $(BIN)/maturin) $(BUILDER)/bin/maturin)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check docs bench shape gpu wheel sdist wheelhouse clean
.PHONY: half-1 half-2 interpreter tools same

help: ## Print the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/built ## Train, prune, save, load and ask the language identifier (about two minutes)
	$(BIN)/python examples/language_id/main.py

test: $(VENV)/built ## Run all tests, in two processes (about ten minutes on two cores)
	cargo test --package pdrs-core
	@$(MAKE) --no-print-directory --jobs=2 --keep-going half-1 half-2

test-fast: $(VENV)/built ## Run all tests but those that take seconds each, to use while working (under three minutes)
	@$(MAKE) --no-print-directory --jobs=2 --keep-going half-1 half-2 MARKS='not slow'

# Each half takes half of the time.
HALF := tests/stacked tests/files
MARKS :=
half-1:
	@echo 'What the tests in $(HALF) print follows when they end.'
	@$(BIN)/python -m pytest -m '$(MARKS)' -p no:cacheprovider $(HALF) > $(VENV)/half.log 2>&1; \
		code=$$?; echo; cat $(VENV)/half.log; exit $$code

half-2:
	$(BIN)/python -m pytest -m '$(MARKS)' tests $(HALF:%=--ignore=%)

check: $(VENV)/built ## Check format, lints, types, stubs, and run the code in README and docs
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/ruff check $(PATHS)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest pdrs._core
	$(BIN)/basedpyright --pythonpath $(BIN)/python --warnings
	$(BIN)/python -m pytest --doctest-glob='*.md' --doctest-glob='*.pyi' --doctest-modules README.md docs python/pdrs

docs: $(VENV)/documents ## Build the documentation as a web site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/built ## Measure side by side with torch, write tables and plots, then ten million names (about forty minutes)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/scale.py 10_000_000

shape: ## Print figures of the structure beside their bounds: import circles, layers, unsafe code, long sentences
	$(PYTHON) tools/shape.py

gpu: ## On a machine with a CUDA device: test and measure there, with what is installed or was carried in (eight minutes)
	$(if $(wildcard $(VENV)/built),$(BIN)/python,$(PYTHON)) benchmarks/on_gpu.py

wheel: | tools $(MATURIN) ## Build a wheel for PYTHON into dist/
	$(MATURIN) build --release --locked --quiet --out $(DIST) --interpreter $(PYTHON)

sdist: | tools $(MATURIN) ## Build a source distribution into dist/
	$(MATURIN) sdist --out $(DIST)

wheelhouse: wheel ## Add to dist/ what `make gpu` needs beside torch on a machine without a network
	$(PYTHON) -m pip download --quiet --only-binary=:all: --dest $(DIST) pytest pytest-timeout hypothesis tqdm

clean: ## Remove what the other targets made
	rm -rf $(VENV) target dist site python/pdrs/_core*.so python/pdrs/_core*.pyd
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PATHS) -name __pycache__ -prune -exec rm -rf {} +

interpreter:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "$(PYTHON) is missing, older than 3.10, or without venv: install it (Debian: apt install python3-venv)," \
		"or name another: make PYTHON=python3.12" >&2; exit 1; }

tools: interpreter
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust (stable) from https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "cc is missing: install a C compiler (Debian: apt install build-essential)" >&2; exit 1; }

# An environment has one Python and one torch. Asking an existing one for others is an error.
same:
	@if test -x $(BIN)/python && test '$(origin PYTHON)' != file; then \
		version='import sys; print(sys.implementation.name, *sys.version_info[:3])'; \
		test "$$($(PYTHON) -c "$$version")" = "$$($(BIN)/python -c "$$version")" || \
		{ echo "$(VENV) has another Python than $(PYTHON): choose another VENV, or remove this one" >&2; exit 1; }; fi
	@if test -e $(VENV)/installed && test '$(origin TORCH)' != file; then \
		test '$(TORCH)' = "$$(cat $(VENV)/installed)" || \
		{ echo "$(VENV) has another torch than $(TORCH): choose another VENV, or remove this one" >&2; exit 1; }; fi

$(BUILDER)/bin/maturin: | tools
	$(PYTHON) -m venv $(BUILDER)
	$(BUILDER)/bin/python -m pip install --quiet 'maturin>=1.9.4,<2'

$(VENV)/installed: pyproject.toml | tools same
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' --group contribute
	echo '$(TORCH)' > $@

# Needs neither torch nor Rust: what the pages say of the API is read from the sources.
$(VENV)/documents: pyproject.toml | interpreter same
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(VENV)/built: $(VENV)/installed $(RUST) pyproject.toml | tools same
	VIRTUAL_ENV=$(abspath $(VENV)) PIP_QUIET=1 $(BIN)/maturin develop --release --quiet
	touch $@
