# SPDX-License-Identifier: Apache-2.0
# make venv | check (lint imports types) | test | test-fast | test-real | fuzz | audit | demo | bench | manifests | clean

BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/pytest

.PHONY: venv check lint imports types test test-fast test-real fuzz audit demo bench manifests clean

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

# docs/testing.md says what is fuzzed. TARGET=wire for one alone; SECONDS=600 each.
TARGET := ranges manifest names challenge routes referrers wire http
SECONDS := 600

fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	@mkdir -p build/fuzz
	@for target in $(TARGET); do $(BIN)/python -m tests.fuzz.run $$target build/fuzz -max_total_time=$(SECONDS) || exit 1; done

# Known holes in what p2pdist brings onto a node; asks a vulnerability service, so CI does not.
audit: $(STAMP)
	@$(BIN)/python -m venv build/audit && build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --strict .

# Without the packages the demo runs on plain loopback, with a registry of its own.
demo: $(STAMP)
	@.ci/packages iproute2 docker-registry || true
	$(BIN)/p2pdist demo $(ARGS)

# bench/README.md says what each line shows. RUNS=5 for its figures; ARGS="rollout --nodes 4" for one command alone.
RUNS := 2
REPORTS := build/bench
rollout = $(BIN)/p2pdist bench rollout --report $(REPORTS)/$(1).html --json $(REPORTS)/$(1).json

bench: $(STAMP)
	@.ci/packages iproute2 docker-registry nginx-light || true
ifdef ARGS
	$(BIN)/p2pdist bench $(ARGS)
else
	$(call rollout,W1) --runs $(RUNS) --workload W1 --system p2pdist --system p2pdist-mdns --system bittorrent
	$(call rollout,W1-24) --runs $(RUNS) --workload W1 --nodes 24 --link-mbit 25 --image-mib 64
	$(call rollout,W4-small) --runs $(RUNS) --workload W4-small --system p2pdist --system direct --system proxy
	$(call rollout,W2-W3) --workload W2 --workload W3
	$(call rollout,W4-W7) --workload W4-upgrade --workload W4-layers --workload W7
	$(BIN)/p2pdist bench simulate --like-lab --runs $(RUNS)
	$(BIN)/p2pdist bench simulate --nodes 300 --image-mib 128
	$(BIN)/p2pdist bench schedules --processes 2
	$(BIN)/p2pdist bench scheduler
	$(BIN)/p2pdist bench node --runs 1
endif

# deploy/kubernetes from the chart; a test compares them.
manifests:
	$${HELM:-helm} template p2pdist deploy/helm/p2pdist --namespace p2pdist --kube-version 1.25.0 >deploy/kubernetes/p2pdist.yaml

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find p2pdist scheduler bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
