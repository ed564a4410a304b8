#!/usr/bin/env bash
# Fetches Debian's 6.1 kernel (the cloud flavour: small, with everything that the data path needs) and unpacks it unless it
# is here already, and prints the directory: boot/vmlinuz-*, boot/config-*, lib/modules/*. Nothing is installed.
# Only the path goes to standard output; progress goes to standard error. Safe to run several times at once.
#
# It comes from the suites that apt is configured for; where these have no 6.1, from Debian's bookworm on the same mirror,
# with package lists of its own, so that the system's stay as they are. KINESIN_KERNEL_SUITE=bookworm goes there at once.
# To have a newer one, delete the directory.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
readonly SERIES=6.1
out=${CARGO_TARGET_DIR:-$root/target}/kernels
kernel=$out/$SERIES

say() { printf 'kernel: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

finish() {
    printf '%s\n' "$kernel"
    exit 0
}

[[ ! -d $kernel ]] || finish
[[ $(uname -m) == x86_64 ]] || die "only for x86-64 so far: this is $(uname -m)"
for tool in apt-get dpkg-deb depmod; do
    PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null || die "$tool is missing: run scripts/setup.sh kernels"
done
mkdir -p "$out"
exec 9>"$out/.lock"
flock 9
[[ ! -d $kernel ]] || finish

work=$(mktemp -d "$out/fetching-XXXXXX")
trap 'rm -rf "$work"' EXIT
apt=(-qq -o APT::Sandbox::User="$(id -un)")

# The newest package of the series that apt knows.
newest() {
    apt-cache "${apt[@]}" pkgnames "linux-image-$SERIES." | grep -E -- '-[0-9]+-cloud-amd64$' | sort -V | tail -1
}

# Gives apt lists of its own: the suite, from wherever this system gets Debian.
from_suite() {
    local suite=$1 mirror keys=/usr/share/keyrings/debian-archive-keyring.gpg trust=
    # shellcheck disable=SC2016  # apt's own placeholders
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(SITE)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }')
    [[ -n $mirror ]] || die "apt here is not configured for Debian, so there is no mirror to ask for its $SERIES kernel"
    [[ ! -e $keys ]] || trust="[signed-by=$keys] "
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    printf 'deb %s%s %s main\n' "$trust" "$mirror" "$suite" >"$work/sources.list"
    apt+=(-o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$work/lists"
        -o Dir::Cache="$work/cache" -o Acquire::Languages=none)
    say "reading the package lists of $suite"
    apt-get "${apt[@]}" update >&2 || die "apt-get could not read $suite from $mirror"
}

package=
if [[ -n ${KINESIN_KERNEL_SUITE:-} ]]; then
    from_suite "$KINESIN_KERNEL_SUITE"
    package=$(newest || true)
else
    package=$(newest || true)
    if [[ -z $package ]]; then
        from_suite bookworm
        package=$(newest || true)
    fi
fi
[[ -n $package ]] || die "no suite has a linux-image-$SERIES.*-cloud-amd64"

say "fetching $package"
(cd "$work" && apt-get "${apt[@]}" download "$package" >&2) || die "apt-get could not fetch $package" \
    "(if its package lists are old: apt-get update)"
dpkg-deb -x "$work/$package"_*.deb "$work/unpacked"
version=${package#linux-image-}
PATH=$PATH:/usr/sbin depmod -b "$work/unpacked" "$version"
mv "$work/unpacked" "$kernel"
finish
