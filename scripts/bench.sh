#!/usr/bin/env bash
# Builds the agent as it is shipped, and measures it. Arguments name sections; without any, all of them run.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

scripts/setup.sh bench
KINESIN_CONTROLPLANE=$(scripts/controlplane.sh)
export KINESIN_CONTROLPLANE
run_as_root
cargo build --release -p kinesin --bin kinesin
exec cargo run --release -p kinesin-bench -- "$@"
