#!/bin/bash
# Builds the guest of build.sh as a host of virtual machines whose kernel has vsock.
#
#   tests/guest/vsock.sh OUT BLOBCR   writes OUT/vmlinuz, OUT/initrd.img and OUT/disk.raw, with the
#                                     program BLOBCR, and the libraries that it needs, in it
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: vsock.sh OUT BLOBCR}
blobcr=${2:?usage: vsock.sh OUT BLOBCR}
fail() { echo "guest: $*" >&2; exit 1; }
for tool in gcc ldd strip; do
    command -v "$tool" >/dev/null || fail "$tool is missing; run tests/setup.sh as root"
done
mkdir -p "$out"
exec 8>"$out/.lock"
flock 8
tree=$out/tree
rm -rf "$tree"
mkdir -p "$tree/bin" "$tree/usr/bin"
gcc -std=gnu11 -Wall -Wextra -Werror -O2 -static -o "$tree/bin/vsock-vm" "$here/vsock-vm.c" ||
    fail "cannot build vsock-vm; install libc6-dev (tests/setup.sh does)"
install -m 755 "$here/vsock-host" "$tree/bin/"
strip -o "$tree/usr/bin/blobcr" "$blobcr"
# Lines are "NAME => FILE (ADDRESS)" and, for the loader, "FILE (ADDRESS)".
while read -r file; do
    install -D -m 755 "$file" "$tree$file"
done < <(ldd "$blobcr" | sed -n 's/^.* => \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p')
BLOBCR_GUEST_EXTRA=$tree BLOBCR_GUEST_MIB=256 BLOBCR_GUEST_MODULES="fuse vhost_vsock vsock_loopback" "$here/build.sh" "$out"
