#!/usr/bin/env bash
# All tests: unit, scenario, kernel, node and cluster. Arguments go to `cargo test`.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

scripts/setup.sh test
KINESIN_CONTROLPLANE=$(scripts/controlplane.sh)
export KINESIN_CONTROLPLANE
run_as_root
# The eBPF programs have no host tests: their tests load them into the kernel, from here.
exec cargo test --workspace --exclude kinesin-ebpf --no-fail-fast "$@"
