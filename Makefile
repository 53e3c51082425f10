# SPDX-License-Identifier: BSD-3-Clause
# `make` alone tells what there is. Every target installs and builds what it needs first; the
# second time that costs next to nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# For `make e2e` and `make test`: pytest's own arguments, for example
#   make e2e PYTEST_ARGS="-k kill --kill-rounds 200"
PYTEST_ARGS ?=
DEMO_ARGS ?=
SEED ?= 1
CRASH_STATES ?= 1000000
SIM_SEEDS ?= 4000
FUZZ_TARGET ?=

VENV := target/venv
PYTHON := $(VENV)/bin/python
TEST_PACKAGES := g++ gcc libc6-dev libiscsi-dev python3-venv
PYTHON_SOURCES := rpc test benches
PROVE := RUST_BACKTRACE=0 cargo test --quiet --features sim,inspect --test prove --
CANARIES := target/canaries.txt
OTHER_CPU := aarch64-unknown-linux-gnu
SAY := printf '== %s\n'
# A function for recipes: packages of Debian, as far as they are missing. As root; others are told.
define INSTALL
install_packages() {
	local package missing=()
	for package in "$$@"; do
		[[ $$(dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null) == installed ]] ||
			missing+=("$$package")
	done
	(($${#missing[@]})) || return 0
	$(SAY) "installing Debian packages: $${missing[*]}"
	local install=(apt-get -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 install)
	export DEBIAN_FRONTEND=noninteractive
	"$${install[@]}" "$${missing[@]}" >/dev/null ||
		{ apt-get -qq update && "$${install[@]}" "$${missing[@]}" >/dev/null; } ||
		{ echo "make: these Debian packages are missing: $${missing[*]}" >&2; return 1; }
}
endef

.PHONY: help
help:  ## Tell what there is
	@echo "pcache: targets"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- what users run --------------------------------------------------------------------------

.PHONY: demo
demo: module $(VENV)/ready  ## Show pcache at work: speed, a kill, recovery, an intact base
	@$(PYTHON) test/demo/demo.py $(DEMO_ARGS)

# Settings: BENCH_ROUNDS=5 BENCH_SECONDS=1 BENCH_ONLY=regex BENCH_CACHE_GIB=16; see docs/PERFORMANCE.md.
.PHONY: bench
bench: module $(VENV)/ready  ## Measure pcache beside its peers (15 minutes): target/bench/
	@$(PYTHON) benches/bench.py

# Settings: TRACE=path CACHE_MIB=number; see docs/PERFORMANCE.md.
.PHONY: bench-trace
bench-trace: module $(VENV)/ready  ## Replay a block trace beside simulated policies: TRACE=file CACHE_MIB=62
	@$(PYTHON) benches/trace.py

.PHONY: test
test: unit aarch64 crash sim fuzz-smoke asan e2e  ## Run all tests: the engine's, then those with real SPDK applications

# ---- what is built ---------------------------------------------------------------------------

.PHONY: spdk
spdk:  ## Find SPDK, or get and build one (about ten minutes, once)
	@found=$$(spdk-sys/spdk.sh ensure)
	eval "$$found"
	$(SAY) "SPDK $$SPDK_VERSION ($$SPDK_LINKAGE) in $${SPDK_DIR:-$$SPDK_PREFIX}"

.PHONY: module
module: rust spdk  ## Build the module: target/pcache/libspdk_bdev_pcache.so and .a
	@$(SAY) "building the module"
	spdk-sys/module.sh

.PHONY: inspect
inspect: rust  ## Build the offline tool: target/pcache/pcache-inspect (docs/inspect.md)
	@$(SAY) "building pcache-inspect"
	cargo build --release --features inspect --bin pcache-inspect
	install -D -m 755 target/release/pcache-inspect target/pcache/pcache-inspect

# ---- tests -----------------------------------------------------------------------------------

.PHONY: unit
unit: rust  ## Run the engine's tests; they need no SPDK
	@$(SAY) "tests of the engine"
	if cargo nextest --version >/dev/null 2>&1; then
		cargo nextest run --features sim,inspect
	else
		cargo test --features sim,inspect
	fi

# The largest CPU of Debian's QEMU says that it has `dc cvap`, and does not know it; this one has `dc cvac`. The test that is
# left out runs itself as a program, which no kernel takes for one of this machine.
.PHONY: aarch64
aarch64: rust  ## Run the engine's tests as on an aarch64 machine, in an emulator
	@$(SAY) "tests of the engine for $(OTHER_CPU)"
	if [[ $$(uname -m) != x86_64 ]]; then
		$(SAY) "left out: they are for x86_64 machines, and this is $$(uname -m)"
		exit 0
	fi
	if ! rustup target add $(OTHER_CPU) >/dev/null 2>&1; then
		$(SAY) "left out: no standard library for it is to be had"
		exit 0
	fi
	$(INSTALL)
	install_packages gcc gcc-aarch64-linux-gnu libc6-dev libc6-dev-arm64-cross qemu-user
	export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
	export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu cortex-a72 -L /usr/aarch64-linux-gnu"
	cargo test --lib --features sim --target $(OTHER_CPU) -- --quiet --skip a_fault_that_is_not_ours

# Each ends with one line of JSON. A failure is repeated with the seed that it prints.
.PHONY: crash
crash: canary  ## Cut the power at every moment and recover: CRASH_STATES=1000000 SEED=1
	@$(SAY) "crash states: $(CRASH_STATES), from seed $(SEED)"
	PCACHE_CANARIES=$(CANARIES) PCACHE_CRASH_STATES=$(CRASH_STATES) PCACHE_SEED=$(SEED) $(PROVE) scenarios crash

.PHONY: sim
sim: rust  ## Simulate histories with faults and crashes: SIM_SEEDS=4000 SEED=1
	@$(SAY) "simulated histories: $(SIM_SEEDS), from seed $(SEED)"
	PCACHE_CANARIES=$(CANARIES) PCACHE_SIM_SEEDS=$(SIM_SEEDS) PCACHE_SEED=$(SEED) $(PROVE) sim

.PHONY: canary
canary: rust  ## Make seeded mistakes, one after the other: each must be found
	@$(SAY) "seeded mistakes"
	mkdir -p target
	cargo test --quiet --features canary --test canary -- --nocapture | tee $(CANARIES)

# A nightly feature of the compiler, but all of it is in the stable one too. The standard library is not
# instrumented, which the address sanitizer does without. Few simulated histories: they take long.
# An allocation that no machine can serve fails, as without the sanitizer: there are tests of that.
.PHONY: asan
asan: rust  ## Run the engine's tests with AddressSanitizer
	@$(SAY) "tests of the engine with AddressSanitizer"
	export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=allocator_may_return_null=1
	export PCACHE_SIM_SEEDS="$${PCACHE_SIM_SEEDS:-20}" PCACHE_CRASH_STATES="$${PCACHE_CRASH_STATES:-5000}"
	host=$$(rustc -vV | sed -n 's/^host: //p')
	cargo test --target "$$host" --target-dir target/asan --features sim --lib --test prove

.PHONY: e2e
e2e: module inspect $(VENV)/ready  ## Run the tests with real SPDK applications
	@$(SAY) "tests with SPDK applications"
	$(PYTHON) -m pytest -v -c test/pytest.ini test/e2e $(PYTEST_ARGS)

# FUZZ_TARGET: one of fuzz/fuzz_targets, or all; FUZZ_SECONDS: for each of them; a smoke: FUZZ_SEED.
.PHONY: fuzz
fuzz: rust target/test-packages  ## Fuzz for long: FUZZ_SECONDS=600 for each target, FUZZ_TARGET=one of them
	@$(SAY) "fuzzing"
	fuzz/run.sh fuzz $(FUZZ_TARGET)

.PHONY: fuzz-smoke
fuzz-smoke: rust target/test-packages  ## Replay the fuzzers' corpus, then fuzz for some seconds
	@$(SAY) "fuzzing, for a moment"
	fuzz/run.sh smoke $(FUZZ_TARGET)

.PHONY: check
check: rust spdk $(VENV)/ready  ## Check format and lints, without and with the SPDK adapter
	@$(SAY) "format and lints"
	cargo fmt --all --check
	cargo clippy --all-targets --features sim,inspect -- -D warnings
	cargo clippy --all-targets --features canary,inspect -- -D warnings
	cargo clippy --workspace --all-targets --features sim,inspect,spdk -- -D warnings
	if rustup target add $(OTHER_CPU) >/dev/null 2>&1; then
		cargo clippy --lib --features sim --target $(OTHER_CPU) -- -D warnings
	else
		$(SAY) "no standard library for $(OTHER_CPU) is to be had: whether it compiles is not known"
	fi
	$(VENV)/bin/ruff check --no-cache --config test/ruff.toml $(PYTHON_SOURCES)
	$(VENV)/bin/ruff format --no-cache --check --config test/ruff.toml $(PYTHON_SOURCES)

.PHONY: clean
clean:  ## Remove what was built here; the SPDK in the cache folder stays
	@rm -rf target

# ---- what all that needs ---------------------------------------------------------------------

# The rustc of Debian 12 is too old for this code, and a toolchain is the user's choice.
.PHONY: rust
rust:
	@needed=$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
	found=$$(rustc --version 2>/dev/null | cut -d ' ' -f 2 || true)
	if ! command -v cargo >/dev/null || [[ -z $$found ]]; then
		echo "make: there is no Rust. Install $$needed or later with rustup (https://rustup.rs)," >&2
		echo "make: then open a new shell, or add ~/.cargo/bin to PATH." >&2
		exit 1
	fi
	if [[ $$(printf '%s\n' "$$needed" "$$found" | sort -V | head -n 1) != "$$needed" ]]; then
		echo "make: Rust $$found is too old, $$needed or later is needed: 'rustup update stable'," >&2
		echo "make: or install rustup (https://rustup.rs) in place of the distribution's Rust." >&2
		exit 1
	fi
	# Rust links with the C compiler.
	if ! command -v cc >/dev/null; then
		$(INSTALL)
		install_packages gcc libc6-dev
	fi

# The C compiler and libiscsi are for the storage client, which the tests build themselves; the C++
# compiler is for libFuzzer.
target/test-packages: Makefile
	@$(INSTALL)
	install_packages $(TEST_PACKAGES)
	mkdir -p target
	touch $@

$(VENV)/ready: test/requirements.txt target/test-packages
	@$(SAY) "installing the Python packages of the tests"
	rm -rf $(VENV)
	/usr/bin/python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --only-binary :all: -r $<
	touch $@
