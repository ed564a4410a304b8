#!/usr/bin/env bash
# Builds the control plane that tests run (etcd, kube-apiserver, kube-controller-manager, kube-proxy and kubectl in one
# program, from tests/controlplane) unless this version of it is built already, and prints its path.
# Only the path goes to standard output; progress goes to standard error. Safe to run several times at once.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
module=$root/tests/controlplane
out=${CARGO_TARGET_DIR:-$root/target}/controlplane

say() { printf 'controlplane: %s\n' "$*" >&2; }

# This script is part of the hash because the build's flags are in it.
hash=$(cat "$module/go.mod" "$module/main.go" "$root/scripts/controlplane.sh" | sha256sum | cut -c1-16)
binary=$out/controlplane-$hash
if [[ -x $binary ]]; then
    printf '%s\n' "$binary"
    exit 0
fi

if ! command -v go >/dev/null; then
    say "Go is missing: install Go 1.26 or newer (https://go.dev/dl) and put its bin directory on PATH"
    exit 1
fi

mkdir -p "$out"
exec 9>"$out/.lock"
if ! flock --nonblock 9; then
    say "another build of it is running: waiting for that one"
    flock 9
fi
if [[ -x $binary ]]; then
    printf '%s\n' "$binary"
    exit 0
fi

version=$(awk '$1 == "k8s.io/kubernetes" { print $2; exit }' "$module/go.mod")
IFS=. read -r major minor _ <<<"${version#v}"
pkg=k8s.io/component-base/version
say "building Kubernetes $version and etcd from their Go modules; the first time takes about 5 minutes on 2 cores"
started=$SECONDS
# -v names each package as it is compiled: that is the progress. Whatever has a space in it is a message for people.
(
    cd "$module"
    CGO_ENABLED=0 nice go build -v -mod=readonly -trimpath -buildvcs=false -tags grpcnotrace \
        -ldflags "-s -w -X $pkg.gitVersion=$version -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor" \
        -o "$binary.part" .
) 2>&1 | awk '
    /^go: downloading / { if (++downloads % 50 == 0) print "controlplane: " downloads " modules downloaded"; fflush(); next }
    / /                 { print; fflush(); next }
                        { if (++packages % 200 == 0) print "controlplane: " packages " packages compiled"; fflush() }
' >&2
mv "$binary.part" "$binary"
# Older versions are a hundred megabytes each, and the Go build cache makes one again in seconds.
find "$out" -maxdepth 1 -name 'controlplane-*' ! -name "controlplane-$hash" -delete
say "built in $((SECONDS - started)) s: $binary"
printf '%s\n' "$binary"
