#!/bin/bash
# Builds the smallest real guest: a Debian kernel, an initramfs that finds the disk, and an ext4 root
# with busybox and the guest programs of this repository.
#
#   tests/guest/build.sh OUT          writes OUT/vmlinuz, OUT/initrd.img and OUT/disk.raw
#
# Nothing is done again when nothing changed. Needs no root, only what tests/setup.sh installs.
#   BLOBCR_GUEST_MIB    size of the root disk in MiB (128)
#   BLOBCR_GUEST_EXTRA  a directory whose contents are copied into the root
#   BLOBCR_GUEST_MODULES  modules that are put into the root's /etc/modules
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:?usage: build.sh OUT}
mib=${BLOBCR_GUEST_MIB:-128}
extra=${BLOBCR_GUEST_EXTRA:-}
root_modules=${BLOBCR_GUEST_MODULES:-}
target=${CARGO_TARGET_DIR:-$root/target}
cache=$target/guest-kernel
modules="virtio_pci virtio_blk virtio_console virtio_net virtio-rng"

say() { echo "guest: $*" >&2; }
fail() { say "$*"; exit 1; }

for tool in apt-get apt-cache dpkg-deb depmod modprobe cpio gzip xz mke2fs busybox cargo; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null ||
        fail "$tool is missing; run tests/setup.sh as root"
done
export PATH=$PATH:/usr/sbin:/sbin
mkdir -p "$out" "$cache"
out=$(cd "$out" && pwd)
exec 9>"$cache/.lock"
flock 9

# --- the kernel: the newest one of Debian's "cloud" kernels, fetched once
kernel=$(find "$cache" -mindepth 1 -maxdepth 1 -name 'linux-image-*' -not -name '*.deb' | sort -V | tail -1)
if [ -z "$kernel" ]; then
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -1)
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64; run tests/setup.sh as root"
    say "fetching $package"
    work=$(mktemp -d "$cache/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get -qq -o APT::Sandbox::User= download "$package" >&2) ||
        fail "cannot fetch $package; check the network, or run apt-get update"
    dpkg-deb -x "$work/$package"_*.deb "$work/tree"
    # Debian 13 keeps modules under /usr/lib; the tools look for them under /lib.
    [ -e "$work/tree/lib" ] || ln -s usr/lib "$work/tree/lib"
    depmod -b "$work/tree" "$(basename "$work"/tree/lib/modules/*)"
    mv "$work/tree" "$cache/$package"
    rm -rf "$work"
    trap - EXIT
    kernel=$cache/$package
fi
version=$(basename "$kernel"/lib/modules/*)

# --- the guest programs, static, so that any root will do
for program in blobcr-guest blobcr-guest-worker; do
    (cd "$root" && cargo rustc --quiet --profile guest -p blobcr-guest --bin "$program" -- \
        -C target-feature=+crt-static) || fail "cannot build $program"
    # A program of a dynamic loader would not even start there.
    if LC_ALL=C readelf -l "$target/guest/$program" 2>/dev/null | grep -q 'Requesting program interpreter'; then
        fail "$program is not static; install libc6-dev (tests/setup.sh does)"
    fi
done

stamp=$( { echo "$version $mib $root_modules"; cat "$0" "$here"/init.* "$here"/rollback "$(command -v busybox)" \
    "$target"/guest/blobcr-guest "$target"/guest/blobcr-guest-worker
    [ -z "$extra" ] || (cd "$extra" && find . ! -type d -print0 | LC_ALL=C sort -z | xargs -0 sha256sum); } |
    sha256sum)
if [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ] && [ -f "$out/disk.raw" ]; then
    say "$out is up to date"
    exit 0
fi
rm -f "$out/stamp"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Copies modules, and what they need, under names that sort as they must be loaded.
put_modules() {
    local to=$1 module verb file name n=0
    shift
    mkdir -p "$to"
    for module in "$@"; do
        # Prints "insmod FILE" for what must be loaded, in order, and "builtin NAME" for what need not be.
        while read -r verb file _; do
            [ "$verb" = insmod ] || continue
            name=$(basename "$file" .xz)
            compgen -G "$to/*-$name" >/dev/null && continue
            n=$((n + 1))
            case $file in
                *.xz) xz -dc "$file" ;;
                *) cat "$file" ;;
            esac >"$to/$(printf '%02d' $n)-$name"
        done < <(modprobe -d "$kernel" -S "$version" --show-depends "$module")
    done
}

# --- the initramfs: just enough modules to find the disk
tree=$work/initramfs
mkdir -p "$tree"/{bin,dev,proc,sys,modules,root}
cp "$(command -v busybox)" "$tree/bin/busybox"
put_modules "$tree/modules" $modules
install -m 755 "$here/init.initramfs" "$tree/init"
(cd "$tree" && find . -print0 | LC_ALL=C sort -z |
    cpio --null -o -H newc -R 0:0 --reproducible --quiet | gzip -n -1) >"$out/initrd.img"

# --- the root
tree=$work/root
mkdir -p "$tree"/{bin,sbin,dev,proc,sys,run,tmp,etc,root,data,mnt}
cp "$(command -v busybox)" "$tree/bin/busybox"
for applet in $(busybox --list); do
    [ -e "$tree/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"
done
install -m 755 "$target/guest/blobcr-guest" "$target/guest/blobcr-guest-worker" "$here/rollback" "$tree/bin/"
install -m 755 "$here/init.root" "$tree/sbin/init"
[ -z "$extra" ] || cp -a "$extra/." "$tree/"
[ -z "$root_modules" ] || put_modules "$tree/etc/modules" $root_modules
rm -f "$out/disk.raw"
truncate -s "${mib}M" "$out/disk.raw"
mke2fs -q -F -t ext4 -L blobcr-guest -E root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0 \
    -d "$tree" "$out/disk.raw"

cp "$kernel/boot/vmlinuz-$version" "$out/vmlinuz"
echo "$stamp" >"$out/stamp"
say "built $out: Linux $version, root of $mib MiB ($(du -k "$out/disk.raw" | cut -f1) KiB used)"
