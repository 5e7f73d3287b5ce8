# One profile, `release`, for the demo, the tests and the lints, so that libtorch's bindings are compiled once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

target := $(or $(CARGO_TARGET_DIR),target)
cargo_flags := --release --locked

.PHONY: help demo test manifests kill-resume sim sim-mutants chaos elastic compare bench-allreduce bench-data bench-engine bench-recovery bench-scale bench-steps sdxl-memory test-hosts test-slurm test-attacks fuzz lint deny libtorch servers

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

demo: libtorch ## Distil the bundled teacher on this machine's CPU, from recipe to report.
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin engine
	$(target)/release/coordinator run configs/quickstart.yaml

test: lint servers ## Run the lints and every test that needs no GPU.
	cargo build $(cargo_flags) --workspace --bins
	set -a; . $(target)/test-servers.env; set +a; \
	cargo test $(cargo_flags) --workspace --no-fail-fast | awk \
	    '{ print; fflush() } \
	     /^test result:/ { passed += $$4; failed += $$6; ignored += $$8 } \
	     END { printf "make test: %d passed, %d failed, %d ignored\n", passed, failed, ignored }'

N ?= 20
SEED ?= 1
kill-resume: libtorch ## Kill runs at N seeded moments (SEED) and compare what they make in the end.
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin engine --bin kill-resume
	$(target)/release/kill-resume --number $(N) --seed $(SEED)

SEEDS ?= 10000
FROM ?= 1
sim: ## Live through SEEDS simulated fleets from seed FROM on, in virtual time.
	cargo build $(cargo_flags) -p distillery-tests --bin simulate
	$(target)/release/simulate --seeds $(SEEDS) --from $(FROM) --shrink

sim-mutants: ## Break the shipping code in each way of tests/mutants.txt and see that the simulation notices.
	cargo build $(cargo_flags) -p distillery-tests --bin mutants
	$(target)/release/mutants

MANIFESTS ?=
manifests: ## Hold the manifests of deploy/kubernetes against their recipes and the three newest versions of Kubernetes (MANIFESTS=--without-schemas).
	@mkdir -p $(target)
	@deploy/manifest-checker.sh >$(target)/manifest-checker.env
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin manifests
	set -a; . $(target)/manifest-checker.env; set +a; \
	$(target)/release/manifests $(MANIFESTS)

MINUTES ?= 10
chaos: servers ## Hurt runs in every way for MINUTES (SEED) and have each audited; some ways take root.
	cargo build $(cargo_flags) -p distillery-coordinator -p distillery-worker -p distillery-tests --bins
	set -a; . $(target)/test-servers.env; set +a; \
	$(target)/release/chaos --minutes $(MINUTES) --seed $(SEED)

SLURM ?= --quickstart
test-slurm: libtorch ## Bring up a real Slurm on this machine (root, Debian packages) and hurt runs on it (SLURM=--short: a minute; SLURM=: without the quickstart).
	deploy/test-slurm.sh
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin engine --bin sim-engine --bin audit --bin test-slurm
	$(target)/release/test-slurm $(SLURM)

elastic: libtorch ## Let engines die, join and leave in N random histories (SEED): one and the same student.
	cargo build $(cargo_flags) --workspace --bins
	$(target)/release/chaos --campaign elastic --title elastic --number $(N) --seed $(SEED)

RECOVERIES ?= 200
bench-recovery: libtorch ## Kill engines of groups of 16 stand-ins and of 4 real ones, RECOVERIES times each, stop and cut off some; time the next step.
	cargo build $(cargo_flags) --workspace --bins
	$(target)/release/chaos --campaign recovery,real-recovery --title bench-recovery --number $(RECOVERIES) --seed $(SEED)

PARTITIONS ?= 30
test-hosts: servers ## Pull cables between two hosts and a bucket on a third (SEED): namespaces, which take root.
	cargo build $(cargo_flags) -p distillery-coordinator -p distillery-worker -p distillery-tests --bins
	set -a; . $(target)/test-servers.env; set +a; \
	$(target)/release/chaos --campaign two-hosts --title test-hosts --number $(PARTITIONS) --seed $(SEED)

compare: libtorch ## Distil by MLCM, LCM and MCD from the same teacher and rows, and say which is ahead.
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin engine --bin compare
	$(target)/release/coordinator run configs/compare.yaml
	$(target)/release/compare runs/compare

bench-engine: libtorch ## Measure guided evaluations and training steps beside PyTorch (PYTHON has torch, diffusers, peft).
	cargo bench --locked -p distillery-engine --bench bench-engine

bench-allreduce: libtorch ## Measure the sum over a TCP ring beside Gloo, by processes on this machine (PYTHON has torch).
	cargo bench --locked -p distillery-engine --bench bench-allreduce

bench-steps: libtorch ## Measure a step with 1, 2 and 4 real engines: what rows and sums take of it, how many messages it needs, shared moments, reproducible batches.
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin engine --bin bench-steps
	$(target)/release/bench-steps

bench-data: ## Measure rows and checkpoints against the bytes themselves and pyarrow, side by side (PYTHON has pyarrow).
	cargo build $(cargo_flags) -p distillery-tests --bin bench-data
	$(target)/release/bench-data

SCALE ?= --peers $(target)/bench-peers
bench-scale: ## Measure what one coordinator carries, with simulated workers, beside Ray, Dask and torchft (SCALE=--short: a minute).
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin sim-engine --bin sim-fleet --bin bench-scale
	$(target)/release/bench-scale $(SCALE)

MEMORY ?=
sdxl-memory: libtorch ## Train at SDXL's full size on the CPU (7 GB of scratch, 12 GiB of memory) and hold its memory against the plan.
	cargo build $(cargo_flags) --bin coordinator --bin worker --bin engine --bin sdxl-memory
	$(target)/release/sdxl-memory $(MEMORY)

IDLE ?= 10000
test-attacks: ## Attack a living run in every way of the threat model (deploy/README.md), with IDLE connections that say nothing.
	cargo build $(cargo_flags) -p distillery-coordinator -p distillery-worker -p distillery-tests --bins
	$(target)/release/test-attacks --idle $(IDLE)

fuzz: ## Feed parsers of foreign bytes, from recipes and files to messages, Slurm's words and the page's requests, with changed inputs for MINUTES (SEED).
	cargo build $(cargo_flags) -p distillery-coordinator -p distillery-worker -p distillery-tests --bins
	$(target)/release/fuzz --minutes $(MINUTES) --seed $(SEED)

lint: libtorch ## Check format, clippy, and, where cargo-deny is there, licences and bans.
	cargo fmt --all --check
	cargo clippy $(cargo_flags) --workspace --all-targets -- -D warnings
	@deploy/cargo-deny.sh --if-there

deny: ## Check licences, bans and sources of the dependencies, and advisories where their database can be reached.
	deploy/cargo-deny.sh

libtorch: ## Find or fetch libtorch (deploy/README.md).
	@deploy/libtorch.sh

servers: ## Install the storage servers for the tests (deploy/README.md).
	@mkdir -p $(target)
	@deploy/test-servers.sh >$(target)/test-servers.env
