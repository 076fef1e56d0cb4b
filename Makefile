# make demo: a tree on this machine. make test: everything that is checked.
# PG_CONFIG names the PostgreSQL to use.
# Of those that are installed with server and headers the newest; clients alone have one, too.
PG_CONFIG ?= $(shell for v in $$(ls /usr/lib/postgresql 2>/dev/null | sort -V); do \
  b=/usr/lib/postgresql/$$v/bin; \
  [ -x $$b/postgres ] && [ -f /usr/include/postgresql/$$v/server/postgres.h ] && echo $$b/pg_config; done | tail -n 1)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
export PG_CONFIG
export PGRX_PG_CONFIG_PATH = $(PG_CONFIG)
PG_MAJOR = $(shell $(PG_CONFIG) --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
TARGET = $(or $(CARGO_TARGET_DIR),target)
PROFILE = debug
RELEASE = $(if $(filter release,$(PROFILE)),--release)

.PHONY: deps build install demo torture test

# Installs what is missing of: PostgreSQL, its headers, libclang (for pgrx's bindings). Debian would make
# and start a server of its own, which nobody here asked for.
NO_SERVER = /etc/postgresql-common/createcluster.d/terrace-build.conf
deps:
	@if [ -z "$(PG_CONFIG)" ] || ! [ -x "$$($(PG_CONFIG) --bindir)/postgres" ] \
	  || ! [ -f "$$($(PG_CONFIG) --includedir-server)/postgres.h" ] || ! ls /usr/lib/llvm-*/lib/libclang*.so* >/dev/null 2>&1; then \
	  echo "installing postgresql, its headers and libclang"; \
	  trap 'exit 130' INT TERM; \
	  trap '$(SUDO) rm -f $(NO_SERVER); $(SUDO) rmdir --ignore-fail-on-non-empty $(dir $(NO_SERVER))' EXIT; \
	  $(SUDO) mkdir -p $(dir $(NO_SERVER)) && \
	  echo 'create_main_cluster = false' | $(SUDO) tee $(NO_SERVER) >/dev/null && \
	  $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -q postgresql postgresql-server-dev-all libclang-dev; \
	fi

build: deps
	$(MAKE) --no-print-directory compile

.PHONY: compile
compile:
	@[ "$(PG_MAJOR)" -ge 15 ] || { echo "PostgreSQL 15 or newer is needed, $(PG_CONFIG) is of $(PG_MAJOR)"; exit 1; }
	cargo build --locked $(RELEASE) -p terrace-bridge
	cargo build --locked $(RELEASE) -p terrace --no-default-features --features pg$(PG_MAJOR)

# For use: the extension where this PostgreSQL looks for it; the bridge is in $(TARGET)/release.
install: deps
	$(MAKE) --no-print-directory PROFILE=release compile install-files

# The same of what is tested.
.PHONY: install-debug
install-debug: build
	$(MAKE) --no-print-directory install-files

.PHONY: install-files
install-files:
	$(SUDO) install -m 755 $(TARGET)/$(PROFILE)/libterrace.so $$($(PG_CONFIG) --pkglibdir)/terrace.so
	$(SUDO) install -m 644 sql/terrace.control sql/terrace--0.1.0.sql $$($(PG_CONFIG) --sharedir)/extension/

# Seven servers and six bridges under pgbench; ONCE=1 ends after the comparison.
demo: install-debug
	@cargo build --quiet --locked -p terrace-tests --bin terrace-demo
	@exec $(TARGET)/debug/terrace-demo

# Random faults on seven servers under load.
SEED ?= 1
torture: install-debug
	@cargo build --quiet --locked -p terrace-tests --bin terrace-torture
	@$(TARGET)/debug/terrace-torture $(SECONDS) $(SEED)

# So many random histories, set-wise and in order.
COUNT ?= 1000
.PHONY: histories
histories: install-debug
	@cargo build --quiet --locked --release -p terrace-bridge -p terrace-tests --bins
	@TERRACE_BRIDGE=$(abspath $(TARGET))/release/terrace-bridge \
	  $(TARGET)/release/terrace-histories $(COUNT) $(SEED)

# Some stories cut links between real addresses; they are skipped aloud where that cannot be.
.PHONY: test-deps
test-deps:
	@[ "$$(id -u)" != 0 ] || { command -v nft && command -v ip; } >/dev/null 2>&1 \
	  || { echo "installing nftables and iproute2"; apt-get update -q; apt-get install -y -q nftables iproute2; } \
	  || echo "without nftables and iproute2 some stories are skipped"

test: install-debug test-deps
	$(MAKE) --no-print-directory check

.PHONY: check
check:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --no-default-features --features terrace/pg$(PG_MAJOR) -- -D warnings
	cargo test --locked -p terrace-bridge
	cargo test --locked -p terrace-bench
	$(MAKE) --no-print-directory scenarios

# The stories on real servers alone. They make and remove some five hundred servers, which takes
# a disk longer than memory, if there is enough.
ROOMY = 8000000
# So many at a time.
STORIES ?= 6
.PHONY: scenarios
scenarios:
	@cd /dev/shm && [ -w . ] && [ "$$(df -k --output=avail . | tail -n 1)" -gt $(ROOMY) ] \
	  && [ "$$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo)" -gt $(ROOMY) ] \
	  && export TMPDIR="$${TMPDIR:-/dev/shm}"; cd "$(CURDIR)" \
	  && cargo test --locked -p terrace-tests -- --test-threads $(STORIES)

# The same with another PostgreSQL, as in `make test-pg-17`: 15 to 18 are fetched to PG_ROOT, once.
PG_ROOT ?= /opt/pgtest
$(PG_ROOT)/%/.ok: scripts/pg-fetch
	$(SUDO) apt-get install -y -q patchelf tzdata
	$(SUDO) scripts/pg-fetch $* $(PG_ROOT)/$*
	$(SUDO) touch $@
.PRECIOUS: $(PG_ROOT)/%/.ok

test-pg-%: $(PG_ROOT)/%/.ok
	$(MAKE) --no-print-directory PG_CONFIG=$(PG_ROOT)/$*/bin/pg_config compile install-files scenarios

# Licences and sources of all crates; needs cargo-deny.
.PHONY: audit
audit:
	cargo deny check licenses bans sources

# Terrace and native subscriptions side by side. QUICK=1 for the short form, without failovers; ONLY="drain tree" for
# some of: drain, tree, latency, tag, fanout, large, memory, copy, compare, failover (or one of
# failover-deaths, failover-silences, failover-rejoin). Servers are in TMPDIR, those of the large, memory, copy
# and compare workloads in /var/tmp if that is in memory. Results in target/bench/. The extension is installed
# as for use, and pglogical to be measured beside.
.PHONY: bench
bench: install
	@[ -e $$($(PG_CONFIG) --pkglibdir)/pglogical.so ] \
	  || $(SUDO) apt-get install -y -q postgresql-$(PG_MAJOR)-pglogical \
	  || echo "pglogical is not to be had here and is left out"
	cargo build --locked --release -p terrace-bench
	TERRACE_BRIDGE=$(abspath $(TARGET))/release/terrace-bridge \
	  $(TARGET)/release/terrace-bench $(if $(filter 1,$(QUICK)),--quick) $(ONLY)

# Runs each fuzz target for so many seconds. Stable Rust does: coverage is a pass of LLVM.
SECONDS ?= 60
FUZZ_TARGETS = pgoutput frames segment record text
FUZZ_HOST = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_FLAGS = --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares

.PHONY: fuzz
fuzz:
	cd fuzz && RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --target $(FUZZ_HOST) --target-dir target
	@set -e; scratch=$$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p fuzz/corpus/$$target fuzz/artifacts/$$target; \
	  echo "fuzzing $$target for $(SECONDS) s"; \
	  TMPDIR=$$scratch fuzz/target/$(FUZZ_HOST)/release/$$target -max_total_time=$(SECONDS) \
	    -print_final_stats=1 -artifact_prefix=fuzz/artifacts/$$target/ fuzz/corpus/$$target; \
	done
