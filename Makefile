# Thin: each target is one command of scripts/ or cargo. Versions and what must be installed: scripts/setup.sh.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup run test test-kernels check bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing to build and run (the other targets do it too)
	@scripts/setup.sh run

run: setup ## build, and show a LoadBalancer Service working on three nodes made of namespaces (ONCE=1: do not wait)
	@source scripts/env.sh && run_as_root && cargo run --bin kinesin -- lab $(if $(filter-out 0,$(ONCE)),--once)

test: ## every test, against the real kernel and a real API server (the first time builds one: about 5 minutes)
	@scripts/test.sh

test-kernels: ## the data path's tests on Debian's 6.1, booted in qemu (ONLY="flows::": some of them)
	@tests/kernels/boot.sh $(ONLY)

check: ## formatting, lints, documentation, licences and advisories
	@scripts/check.sh

bench: ## what it costs: first sync, memory, time to the maps, ns per packet, requests/s (ONLY="micro sync": some of it)
	@scripts/bench.sh $(ONLY)
