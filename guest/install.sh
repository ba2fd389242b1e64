#!/bin/bash
# Builds what a guest needs, in release, and installs it.
#
#   guest/install.sh PREFIX           programs, libraries, headers, pkg-config files, a Python module, man
#                                     pages, units
#
#   DESTDIR          installs below it, for packages
#   BLOBCR_PROFILE   another profile of cargo (release)
set -euo pipefail

say() { echo "install: $*" >&2; }
fail() { say "$*"; exit 1; }

[ $# -eq 1 ] || fail "usage: guest/install.sh PREFIX"
case $1 in
    /*) prefix=${1%/} ;;
    *) fail "the prefix must be an absolute path: the pkg-config files name it" ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
profile=${BLOBCR_PROFILE:-release}
target=${CARGO_TARGET_DIR:-$root/target}
to=${DESTDIR:-}$prefix
# Where rustup puts cargo, for a shell that was open before.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
command -v cargo >/dev/null || fail "there is no cargo; tests/setup.sh installs one"

(cd "$root" && cargo build --quiet --locked --profile "$profile" \
    -p blobcr-guest -p blobcr-guest-c -p blobcr-guest-mpi) || fail "cannot build"
# Cargo's one exception: the profile dev builds in debug.
built=$target/${profile/#dev/debug}
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
[ -n "$version" ] || fail "Cargo.toml tells no version"

put() { install -D -m "$1" "$2" "$to/$3"; }
# Without what only debuggers read: it is nine tenths of them, and guests' images are copied a lot.
put_stripped() { install -D -s -m 755 "$1" "$to/$2"; }
put_stripped "$built/blobcr-guest" bin/blobcr-guest
for launcher in blobcr-job blobcr-criu; do
    put 755 "$root/guest/launch/$launcher" "bin/$launcher"
done
for library in libblobcr libblobcr_mpi; do
    put_stripped "$built/$library.so" "lib/$library.so.1"
    ln -sf "$library.so.1" "$to/lib/$library.so"
done
put 644 "$built/libblobcr.a" lib/libblobcr.a
strip --strip-debug "$to/lib/libblobcr.a"
for header in blobcr.h blobcr-guest.h blobcr_mpi.h; do
    put 644 "$root/guest/include/$header" "include/$header"
done
# A file in a tree of its own says where it is, whatever replaced it there before.
fill() {
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@VERSION@|$version|g" "$1" | install -D -m 644 /dev/stdin "$to/$2"
}
for pc in blobcr blobcr-mpi; do
    fill "$root/guest/$pc.pc.in" "lib/pkgconfig/$pc.pc"
done
for unit in blobcr-checkpoint.service blobcr-checkpoint.timer; do
    fill "$root/guest/systemd/$unit" "lib/systemd/system/$unit"
done
put 644 "$root/guest/python/blobcr.py" lib/python3/dist-packages/blobcr.py
put 644 "$root/docs/man/blobcr_checkpoint.3" share/man/man3/blobcr_checkpoint.3
for page in blobcr_wait blobcr_status blobcr_begin_set blobcr_set_status blobcr_last_error; do
    ln -sf blobcr_checkpoint.3 "$to/share/man/man3/$page.3"
done
put 644 "$root/docs/man/blobcr-guest.1" share/man/man1/blobcr-guest.1
say "installed blobcr-guest $version in $to"
