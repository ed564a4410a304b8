#!/usr/bin/env bash
# Everything that can be said about the code without running it. Stops at the first step that finds something.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

scripts/setup.sh check
nightly=$(sed -n 's/.*EBPF_TOOLCHAIN.*"\(nightly-[0-9-]*\)".*/\1/p' build.rs)
step() { printf 'check: %s\n' "$*"; }

step "shell scripts parse"
bash -n scripts/*.sh .ci/run

step "formatting"
cargo fmt --all --check
unformatted=$(gofmt -l tests/controlplane)
if [[ -n $unformatted ]]; then
    printf 'check: run gofmt -w on: %s\n' "$unformatted" >&2
    exit 1
fi

step "docs/actors.md is what the actors say"
scripts/actors.sh --check

step "clippy"
cargo clippy --workspace --exclude kinesin-ebpf --all-targets -- -D warnings

step "clippy of the eBPF programs, for their own target"
# The same flags as aya-build gives, in a directory of its own because the toolchain is another one.
(
    cd ebpf/programs
    CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$root/target}/ebpf-check" \
        CARGO_ENCODED_RUSTFLAGS="--cfg=bpf_target_arch=\"$(uname -m)\"" \
        cargo "+$nightly" clippy --release -Z build-std=core --target bpfel-unknown-none -- -D warnings
)

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --exclude kinesin-ebpf --no-deps

step "dependencies: licences, bans, sources"
cargo deny --log-level error check --hide-inclusion-graph licenses bans sources

step "dependencies: advisories"
if timeout 120 cargo deny --log-level off fetch db >/dev/null 2>&1; then
    cargo deny check --disable-fetch --hide-inclusion-graph advisories
else
    advisories="NOT checked: the RustSec database (github.com/RustSec/advisory-db) cannot be reached from here"
fi

step "clean${advisories:+; advisories were $advisories}"
