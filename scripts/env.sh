# Sourced by the other scripts and the Makefile: where the tools are, and how to become root for what needs it.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A shell that never logged in does not have these two on its PATH.
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/local/go/bin"

# Building needs no privileges; running does (namespaces, eBPF). cargo starts every program and test through this.
run_as_root() {
    ((EUID != 0)) || return 0
    if ! command -v sudo >/dev/null; then
        printf '%s\n' "This makes network namespaces and loads eBPF programs, which needs root, and there is no sudo." \
            "Run it as root." >&2
        return 1
    fi
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    host=${host//-/_}
    export "CARGO_TARGET_${host^^}_RUNNER=sudo -E env PATH=$PATH"
    printf '%s\n' "Not root: what needs it (network namespaces, eBPF) is run through sudo." >&2
}
