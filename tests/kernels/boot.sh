#!/usr/bin/env bash
# The tests of the data path on another kernel: boots Debian's 6.1 under qemu with nothing but the test program, the few
# tools that it runs, and their libraries, and passes on how the tests ended. The test program is the one of
# `cargo test --test datapath`: it loads programs and maps by the agent's own code.
#
# usage: tests/kernels/boot.sh [argument of the test program...]      e.g. boot.sh flows::
#
# KINESIN_KERNEL_TIMEOUT: seconds until the machine is given up (default 1800; emulated, it takes a few minutes)
# KINESIN_KERNEL_ACCEL: tcg or kvm; unset, kvm where the processor and /dev/kvm offer it
#
# Deliberately absent: a root file system, a network, anything that outlives the run.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/env.sh"
cd "$root"
export PATH=$PATH:/usr/sbin:/sbin

say() { printf 'kernels: %s\n' "$*"; }

scripts/setup.sh kernels
kernel=$(scripts/kernel.sh)
version=$(basename "$kernel"/lib/modules/*)

say "building the tests"
program=$(cargo test --test datapath --no-run --message-format=json-render-diagnostics |
    sed -n 's/.*"name":"datapath".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
[[ -x $program ]] || { say "cargo did not say where the test program is"; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/kinesin-kernels-XXXXXX")
trap 'rm -rf "$work"' EXIT
image=$work/image
mkdir -p "$image"/{dev,modules,proc,run,sys,tests,tmp}
# As here: directories, or links into /usr.
for dir in bin sbin lib lib64; do
    if [[ -L /$dir ]]; then
        mkdir -p "$image/usr/$dir"
        ln -s "usr/$dir" "$image/$dir"
    else
        mkdir -p "$image/$dir"
    fi
done

# Files at the paths that they have here, with the libraries that they need.
add() {
    local file
    for file in "$@"; do
        install -D -m 755 "$file" "$image$file"
        # "name => path (address)", and the loader as "path (address)".
        while read -r library; do
            [[ -e $image$library ]] || install -D -m 755 "$library" "$image$library"
        done < <(ldd "$file" | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) .*/\1/p')
    done
}
add "$(command -v sh)" "$(command -v mount)" "$(command -v insmod)" "$(command -v ip)" "$(command -v tc)"
add "$program"
strip --strip-debug -o "$image/tests/datapath" "$program"
rm "$image$program"
install -m 755 tests/kernels/init "$image/init"
printf '%s\n' "$@" >"$image/tests/arguments"

# What Debian builds as modules, in the order in which they depend on each other.
number=100
for module in veth bridge tun sch_ingress cls_bpf sctp; do
    while read -r verb path _; do
        [[ $verb == insmod ]] || continue
        compgen -G "$image/modules/*-$(basename "$path")" >/dev/null && continue
        cp "$path" "$image/modules/$((number++))-$(basename "$path")"
    done < <(modprobe --set-version "$version" --dirname "$kernel" --show-depends "$module")
done
(cd "$image" && find . | cpio --quiet -o -H newc) >"$work/initramfs"

accel=${KINESIN_KERNEL_ACCEL:-tcg}
if [[ -z ${KINESIN_KERNEL_ACCEL:-} && -w /dev/kvm ]] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    accel=kvm
fi
limit=${KINESIN_KERNEL_TIMEOUT:-1800}
say "booting $version ($accel, $limit seconds at most)"
ended=0
timeout --foreground "$limit" qemu-system-x86_64 -accel "$accel" -cpu max -smp 2 -m 3072 -nodefaults -display none \
    -serial stdio -no-reboot -kernel "$kernel/boot/vmlinuz-$version" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 rdinit=/init" </dev/null | sed -u 's/\r$//' | tee "$work/console" || ended=$?
status=$(sed -n 's/^kernels: the tests ended with \([0-9]*\)$/\1/p' "$work/console" | tail -1)
if [[ -z $status ]]; then
    if ((ended == 124)); then
        say "not done within $limit seconds"
    else
        say "the machine ended before the tests did"
    fi
    exit 1
fi
say "status $status on $version"
exit "$status"
