#!/bin/bash
# Builds the guest of build.sh with MPICH, the MPI hook, CRIU and the example job in it.
#
#   tests/guest/mpi.sh OUT            writes OUT/vmlinuz, OUT/initrd.img, OUT/disk.raw, and OUT/host/heat,
#                                     the job for this machine
#
# MPICH, CRIU and the C library are those of this machine: what a program needs is found by ldd. The
# modules that CRIU needs are those of the guest's kernel, which build.sh fetches.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:?usage: mpi.sh OUT}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
target=$CARGO_TARGET_DIR
mkdir -p "$out"
out=$(cd "$out" && pwd)

fail() { echo "guest: $*" >&2; exit 1; }
export PATH=$PATH:/usr/sbin:/sbin
for tool in mpicc.mpich mpiexec.hydra hydra_pmi_proxy criu nft ldd cargo; do
    command -v "$tool" >/dev/null || fail "$tool is missing; run tests/setup.sh as root"
done

(cd "$root" && cargo build --quiet --locked --release -p blobcr-guest-mpi) || fail "cannot build the MPI hook"
exec 8>"$out/.lock"
flock 8
mkdir -p "$out/host"
tree=$out/tree
rm -rf "$tree"
mkdir -p "$tree"/{bin,usr/bin,usr/sbin,usr/lib,etc}
heat=$root/guest/examples/heat.c
mpicc.mpich -std=c99 -O2 "$heat" -I "$root/guest/include" -L "$target/release" -lblobcr_mpi -lm -o "$tree/bin/heat"
mpicc.mpich -std=c99 -O2 -DPLAIN -rdynamic "$heat" -lm -o "$tree/bin/heat-plain"
# Nothing of it can be found from outside: it exports no function that saves its state.
mpicc.mpich -std=c99 -O2 -DPLAIN "$heat" -lm -o "$tree/bin/heat-closed"
install -m 755 "$tree/bin/heat-plain" "$out/host/heat"
cp "$(command -v mpiexec.hydra)" "$(command -v hydra_pmi_proxy)" "$tree/usr/bin/"
cp "$(command -v criu)" "$(command -v nft)" "$tree/usr/sbin/"
cp "$target/release/libblobcr_mpi.so" "$tree/usr/lib/"
ln -s libblobcr_mpi.so "$tree/usr/lib/libblobcr_mpi.so.1"
install -m 755 "$root"/guest/launch/blobcr-{job,criu} "$here"/job-{node,plain,criu} "$tree/bin/"
ln -s hydra_pmi_proxy "$tree/usr/bin/hydra_pmi_proxy.mpich"
for program in "$tree"/bin/heat "$tree"/bin/heat-plain "$tree"/usr/bin/mpiexec.hydra \
    "$tree"/usr/bin/hydra_pmi_proxy "$tree"/usr/sbin/{criu,nft} "$tree"/usr/lib/libblobcr_mpi.so; do
    # Lines are "NAME => FILE (ADDRESS)" and, for the loader, "FILE (ADDRESS)".
    while read -r file; do
        [ -e "$tree$file" ] || install -D -m 755 "$file" "$tree$file"
    done < <(LD_LIBRARY_PATH=$target/release ldd "$program" | sed -n 's/^.* => \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p' |
        grep -v "^$target")
done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$tree/etc/passwd"
printf '127.0.0.1 localhost\n' >"$tree/etc/hosts"

# What CRIU asks for sockets, and cuts the network with.
modules="unix_diag inet_diag tcp_diag udp_diag raw_diag af_packet_diag netlink_diag nf_tables"
BLOBCR_GUEST_MODULES=$modules BLOBCR_GUEST_EXTRA=$tree BLOBCR_GUEST_MIB=${BLOBCR_GUEST_MIB:-256} "$here/build.sh" "$out"
