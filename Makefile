# Every target does its own set-up; nothing has to be installed by hand but a Rust toolchain.
# ARGS goes to the program that the target runs: make demo ARGS=--json

ARGS ?=
CARGO ?= cargo

.PHONY: help setup build demo test check fmt clippy docs deny bench fuzz-short torture clean

help:
	@echo "make setup   install the system packages that are missing (Debian; sudo when not root)"
	@echo "make build   build target/release/pageferry"
	@echo "make demo    move a live guest between two hosts on this machine"
	@echo "make test    run all tests"
	@echo "make check   formatting, lints, documentation, dependencies, and all tests"
	@echo "make test-rdma  test RDMA on soft-RoCE and soft-iWARP, in a VM without a NIC"
	@echo "make fuzz-short  run every fuzz target for ten seconds (make test does so too)"
	@echo "make torture  faults on live migrations of real guests: make torture ARGS=--duration=10m"
	@echo "make bench   run the benchmarks: make bench ARGS=migrate-vs-qemu"

setup:
	@.ci/setup

build: setup
	$(CARGO) build --release -p pageferry

demo: build
	target/release/pageferry demo $(ARGS)

test: setup
	.ci/test $(ARGS)

check: fmt clippy docs deny test

fmt: setup
	$(CARGO) fmt --all --check

clippy: setup
	$(CARGO) clippy --workspace --all-targets -- -D warnings

docs: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

deny: setup
	@if ! command -v cargo-deny >/dev/null; then \
		echo "SKIP cargo-deny: not installed (cargo install --locked cargo-deny)"; \
	elif $(CARGO) deny fetch db 2>/dev/null; then \
		$(CARGO) deny --workspace check; \
	else \
		echo "SKIP advisories: their database can't be reached"; \
		$(CARGO) deny --workspace check bans licenses sources; \
	fi

bench: build
	$(CARGO) run --release -p pageferry-bench -- $(ARGS)

fuzz-short: setup
	$(CARGO) test -p pageferry-tests --test fuzz_short -- --nocapture

# Agents can be held in a phase only where debug assertions are built in.
torture: setup
	$(CARGO) run -p pageferry-tests --bin torture -- $(ARGS)

clean:
	$(CARGO) clean

include tests/rdma-vm/rdma-vm.mk
