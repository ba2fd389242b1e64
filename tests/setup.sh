#!/bin/bash
# Installs what the demo and the tests need on Debian 12 or 13, and says what it does. What is there
# already is left alone; when nothing is missing it needs no root and no network.
#
#   tests/setup.sh            installs
#   tests/setup.sh --check    only says what is missing (exit code 1 when something is)
#   tests/setup.sh --bench    also what the benchmarks measure us beside; may come before --check
set -euo pipefail

# What builds the programs, and what links a static one for the guest.
packages=(ca-certificates curl gcc libc6-dev binutils)
# What builds the guest: kernel modules, an initramfs, an ext4 root.
packages+=(busybox-static cpio kmod e2fsprogs xz-utils)
# What mounts, and what the tests look at the mount with.
packages+=(fuse3 fio strace)
# What puts processes of the tests into networks of their own, and ends them with their test.
packages+=(iproute2 util-linux)
# What builds the client of etcd, and the etcd that tests start by themselves on free ports.
packages+=(protobuf-compiler libprotobuf-dev etcd-server etcd-client)
# What compiles programs against the libraries for guests, and runs them as jobs of either MPI.
packages+=(g++ gfortran pkg-config python3 mpich libmpich-dev openmpi-bin libopenmpi-dev)
# What saves the processes of a job, in the guest.
packages+=(criu nftables)
# What the benchmarks measure us beside.
if [ "${1:-}" = --bench ]; then
    packages+=(restic borgbackup btrfs-progs ceph-mon ceph-mgr ceph-osd ceph-common)
    shift
fi
# QEMU 9.2 is the first whose sockets reconnect within milliseconds.
qemu_packages=(qemu-system-x86 qemu-utils)
qemu_min=9.2
rust_min=1.88

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }
# Nothing ends silently.
trap 'say "line $LINENO failed: $BASH_COMMAND"' ERR
installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q ' installed$'; }
at_least() { dpkg --compare-versions "$1" ge "$2"; }

command -v dpkg >/dev/null || fail "this is no Debian; install by hand: ${packages[*]} ${qemu_packages[*]}"
# shellcheck disable=SC1091
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

missing=()
for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
done
qemu_version() { dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null | sed 's/^[0-9]*://'; }
need_qemu=no
for package in "${qemu_packages[@]}"; do
    installed "$package" || need_qemu=yes
done
at_least "$(qemu_version)" "$qemu_min" || need_qemu=yes
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
rust_version() { rustc --version 2>/dev/null | cut -d' ' -f2; }
need_rust=no
at_least "$(rust_version)" "$rust_min" || need_rust=yes
[ "$(command -v cargo)" ] || need_rust=yes

# The file system exerciser, for the tests: built here, because Debian has none.
fsx_version=0.3.2
tools=$(cd "$(dirname "$0")/.." && pwd)/target/tools
need_fsx=no
[ "$("$tools/bin/fsx" --version 2>/dev/null)" = "fsx $fsx_version" ] || need_fsx=yes

if [ "${1:-}" = --check ]; then
    [ ${#missing[@]} -eq 0 ] || say "missing: ${missing[*]}"
    [ $need_qemu = no ] || say "missing: QEMU $qemu_min or later"
    [ $need_rust = no ] || say "missing: Rust $rust_min or later"
    [ $need_fsx = no ] || say "missing: fsx $fsx_version"
    [ "${#missing[@]}$need_qemu$need_rust$need_fsx" = 0nonono ]
    exit
fi

as_root=()
if [ "$(id -u)" != 0 ] && { [ ${#missing[@]} -gt 0 ] || [ $need_qemu = yes ]; }; then
    command -v sudo >/dev/null || fail "not root and no sudo; run tests/setup.sh as root"
    as_root=(sudo)
fi
apt() {
    say "apt-get $*"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" >&2 ||
        fail "apt-get $1 failed; mend what it says above, then run tests/setup.sh again"
}

# Debian 12 has QEMU 7.2; its backports have one that is new enough.
qemu_from=()
if [ $need_qemu = yes ] && [ "$codename" = bookworm ]; then
    qemu_from=(-t bookworm-backports)
    if ! grep -rqsE '^(Suites:|deb ).*bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d \
        --include='*.sources' --include='*.list'; then
        list=/etc/apt/sources.list.d/bookworm-backports.list
        # grep also fails where one of the two places is not there, so its status says nothing.
        mirror=$({ grep -rhsoE '^(URIs:|deb( \[[^]]*\])?) *https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list \
            /etc/apt/sources.list.d --include='*.sources' --include='*.list' || true; } |
            sed -nE '1s/.*(https?:\/\/[^ ]+).*/\1/p')
        [ -n "$mirror" ] || fail "no Debian mirror in /etc/apt; add bookworm-backports to its sources by hand"
        say "adding $list"
        echo "deb $mirror bookworm-backports main" | "${as_root[@]}" tee "$list" >/dev/null
    fi
fi
if [ ${#missing[@]} -gt 0 ] || [ $need_qemu = yes ]; then
    apt update
fi
if [ $need_qemu = yes ]; then
    apt install --no-install-recommends "${qemu_from[@]}" "${qemu_packages[@]}"
    at_least "$(qemu_version)" "$qemu_min" ||
        fail "QEMU $(qemu_version) is too old and this Debian ($codename) has no later one; $qemu_min is needed"
fi
if [ ${#missing[@]} -gt 0 ]; then
    apt install --no-install-recommends "${missing[@]}"
fi
if [ $need_rust = yes ]; then
    if ! command -v rustup >/dev/null; then
        from=https://static.rust-lang.org/rustup/dist/$(uname -m)-unknown-linux-gnu/rustup-init
        say "installing rustup for $(id -un) from $from"
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        for file in rustup-init rustup-init.sha256; do
            curl --proto '=https' --tlsv1.2 -sSfo "$work/$file" "${from%/*}/$file" ||
                fail "cannot fetch $file; check the network"
        done
        [ "$(cut -d' ' -f1 "$work/rustup-init.sha256")" = "$(sha256sum "$work/rustup-init" | cut -d' ' -f1)" ] ||
            fail "what was fetched from $from is damaged; try again"
        chmod 755 "$work/rustup-init"
        "$work/rustup-init" -y --profile minimal --default-toolchain none >&2 || fail "rustup-init failed"
    fi
    say "rustup: the stable toolchain"
    rustup toolchain install stable --profile minimal >&2
    rustup default stable >&2
    at_least "$(rust_version)" "$rust_min" ||
        fail "rustc is $(rust_version) and $rust_min is needed; see that rustup's comes first in PATH"
    say "a new shell has cargo in its PATH; this one after: . \"\$HOME/.cargo/env\""
fi
if [ $need_fsx = yes ]; then
    say "building fsx $fsx_version"
    cargo install fsx --version "$fsx_version" --locked --root "$tools" >&2 ||
        fail "cargo could not install fsx $fsx_version; mend what it says above, then run tests/setup.sh again"
fi
[ -e /dev/fuse ] || say "note: there is no /dev/fuse; load the fuse module (modprobe fuse) before you mount"
say "ready: $(qemu-system-x86_64 --version | head -1), $(rustc --version), $(fusermount3 --version)"
