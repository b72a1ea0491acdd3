# SPDX-License-Identifier: Apache-2.0
# make venv | check (lint imports types) | test | test-fast | test-real | demo | bench | clean

BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/pytest

.PHONY: venv check lint imports types test test-fast test-real demo bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml .ci/venv
	@.ci/venv
	@touch $@

# `make -k check` goes on after the first complaint.
check: lint imports types

lint: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

imports: $(STAMP)
	$(BIN)/lint-imports --no-logo

types: $(STAMP)
	$(BIN)/mypy

# The fast tests first: a mistake shows within a minute.
test: test-fast test-real

test-fast: $(STAMP)
	$(PYTEST) -m "not real" -n 2

test-real: $(STAMP)
	@.ci/packages
	$(PYTEST) -m real

# Without the packages the demo runs on plain loopback, with a registry of its own.
demo: $(STAMP)
	@.ci/packages iproute2 docker-registry || true
	$(BIN)/p2pdist demo $(ARGS)

bench: $(STAMP)
	$(BIN)/p2pdist bench $(ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find p2pdist scheduler bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
