#!/usr/bin/env bash
# Installs whatever is missing to build, run and test Kinesin, and nothing that is there already.
#
#   scripts/setup.sh          what `make run` needs: the pinned Rust, the pinned nightly for eBPF, LLVM, bpf-linker
#   scripts/setup.sh test     and what `make test` needs: Go, which builds the control plane the tests run, ip(8), and what
#                             others write rules with
#   scripts/setup.sh kernels  and what `make test-kernels` needs: qemu, and the tools to pack a kernel's first files
#   scripts/setup.sh bench    and what `make bench` needs: what kube-proxy, which is measured too, writes its rules with
#   scripts/setup.sh check    and what `make check` needs: cargo-deny, and the nightly's clippy
#
# Every version is read from the file that decides it (rust-toolchain.toml, build.rs) or set once below. When nothing is
# missing it only looks, touches no network, and is done in a fraction of a second. Deliberately absent: any download
# outside apt-get, rustup and cargo.
set -euo pipefail

# bpf-linker must read the bitcode of the pinned nightly: its LLVM and the nightly's must be of one major version.
readonly LLVM=22
readonly BPF_LINKER=0.13.0
readonly CARGO_DENY=0.20.2
# The oldest Go that the control plane's go.mod accepts.
readonly GO_MAJOR=1 GO_MINOR=26

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
purpose=${1:-run}

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

case $purpose in
run | test | bench | kernels | check) ;;
*) die "unknown purpose '$purpose'" "usage: scripts/setup.sh [run|test|bench|kernels|check]" ;;
esac
[[ $(uname -s) == Linux ]] || die "Kinesin runs on Linux only, this is $(uname -s)"

# Installs Debian packages, or says what to install where there is no apt-get.
apt_install() {
    have apt-get || die "missing here, and apt-get is not this system's package manager: $*" \
        "install what these Debian packages contain, then run this again"
    local sudo=()
    if ((EUID != 0)); then
        have sudo || die "not root and no sudo: run as root: apt-get install $*"
        sudo=(sudo)
    fi
    say "installing packages: $*"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update ||
        say "apt-get update failed: going on with the package lists that are here"
    if ! "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"; then
        die "apt-get could not install: $*" \
            "(LLVM $LLVM is in Debian's security archive and at https://apt.llvm.org)"
    fi
}

# A C compiler, for the few dependencies with C in them (mimalloc, aws-lc) and to link at all.
if ! have cc; then
    apt_install gcc libc6-dev
fi

# rustup, and through it the two pinned toolchains. rustup itself decides nothing here: every name is explicit.
if ! have rustup; then
    if have apt-get && apt-cache show rustup >/dev/null 2>&1; then
        apt_install rustup
    else
        die "rustup is missing and not in this system's packages: install it from https://rustup.rs," \
            "then run this again (a Rust from elsewhere cannot supply the pinned nightly)"
    fi
fi

# toolchain NAME COMPONENT...: that toolchain with at least these components.
toolchain() {
    local name=$1 component installed flags=()
    shift
    installed=$(rustup component list --toolchain "$name" --installed 2>/dev/null || true)
    local missing=()
    [[ -n $installed ]] || missing=(rustc)
    for component in "$@"; do
        flags+=(--component "$component")
        [[ $'\n'$installed =~ $'\n'$component(-|$'\n'|$) ]] || missing+=("$component")
    done
    if ((${#missing[@]} > 0)); then
        say "installing Rust $name: ${missing[*]}"
        rustup toolchain install "$name" --profile minimal --no-self-update "${flags[@]}" ||
            die "rustup could not install $name: see its message above"
    fi
}

stable=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' "$root/rust-toolchain.toml")
nightly=$(sed -n 's/.*EBPF_TOOLCHAIN.*"\(nightly-[0-9-]*\)".*/\1/p' "$root/build.rs")
[[ -n $stable ]] || die "rust-toolchain.toml has no channel"
[[ -n $nightly ]] || die "build.rs has no EBPF_TOOLCHAIN"
toolchain "$stable" clippy rustfmt
if [[ $purpose == check ]]; then
    toolchain "$nightly" rust-src clippy
else
    toolchain "$nightly" rust-src
fi

# bpf-linker: LLVM's development packages are only needed to build it, its shared library to run it.
linker=$(bpf-linker --version 2>/dev/null || true)
libraries=$(ldd "$(command -v bpf-linker)" 2>/dev/null || true)
if [[ $linker != "bpf-linker $BPF_LINKER" || $libraries != *"libLLVM.so.$LLVM"* ]]; then
    if [[ ! -x /usr/lib/llvm-$LLVM/bin/llvm-config || ! -e /usr/lib/llvm-$LLVM/lib/libLLVM.so ||
        ! -e /usr/include/zstd.h || ! -e /usr/include/zlib.h ]] || ! have c++; then
        apt_install "llvm-$LLVM-dev" "libclang-$LLVM-dev" "libpolly-$LLVM-dev" "clang-$LLVM" libzstd-dev zlib1g-dev g++
    fi
    say "building bpf-linker $BPF_LINKER with LLVM $LLVM (one to three minutes)"
    LLVM_PREFIX=/usr/lib/llvm-$LLVM cargo "+$stable" install bpf-linker --version "$BPF_LINKER" --locked --force \
        --no-default-features --features "llvm-$LLVM" ||
        die "bpf-linker did not build: see its message above"
fi

if [[ $purpose != run ]]; then
    have go || die "Go is missing: install Go $GO_MAJOR.$GO_MINOR or newer (https://go.dev/dl) and put its bin directory on PATH"
    # From outside the module, so that Go does not go looking for another version of itself.
    go=$(cd / && go env GOVERSION)
    IFS=. read -r major minor _ <<<"${go#go}"
    minor=${minor%%[!0-9]*}
    if ((major < GO_MAJOR || (major == GO_MAJOR && ${minor:-0} < GO_MINOR))); then
        die "Go is $go: install Go $GO_MAJOR.$GO_MINOR or newer (https://go.dev/dl) and put its bin directory on PATH"
    fi
fi

if [[ $purpose == test || $purpose == bench || $purpose == kernels ]] && ! have ip; then
    apt_install iproute2
fi

# Tools of root are where only root's PATH goes.
have_root() { PATH=$PATH:/usr/sbin:/sbin have "$1"; }

# What kube-proxy writes its rules with; tests write some of the same kinds.
if [[ $purpose == test || $purpose == bench ]]; then
    missing=()
    tools=(nft:nftables iptables-legacy:iptables)
    [[ $purpose == test ]] || tools+=(ipset:ipset conntrack:conntrack)
    for tool in "${tools[@]}"; do
        have_root "${tool%:*}" || missing+=("${tool#*:}")
    done
    ((${#missing[@]} == 0)) || apt_install "${missing[@]}"
fi

if [[ $purpose == kernels ]]; then
    missing=()
    for tool in qemu-system-x86_64:qemu-system-x86 cpio:cpio depmod:kmod strip:binutils; do
        have_root "${tool%:*}" || missing+=("${tool#*:}")
    done
    ((${#missing[@]} == 0)) || apt_install "${missing[@]}"
fi

if [[ $purpose == check && $(cargo-deny --version 2>/dev/null || true) != "cargo-deny $CARGO_DENY" ]]; then
    # Unoptimised: it runs for seconds, and its optimised build takes many minutes.
    say "building cargo-deny $CARGO_DENY (a few minutes)"
    cargo "+$stable" install cargo-deny --version "$CARGO_DENY" --locked --force --debug ||
        die "cargo-deny did not build: see its message above"
fi
