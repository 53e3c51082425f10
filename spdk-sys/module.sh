#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# module.sh - builds the loadable and the linkable form of the pcache bdev module.
#
#   module.sh [OUTPUT_FOLDER]     default: target/pcache in the project
#
# Makes, for the SPDK that `spdk.sh find` names (see there for SPDK_DIR):
#
#   libspdk_bdev_pcache.so              to be preloaded into SPDK applications that were built shared
#   libspdk_bdev_pcache.a               to be linked into an application
#   pkgconfig/spdk_bdev_pcache.pc       how
#   pcache-run                          starts an application with the .so
#   LICENSES                            of pcache, and of all that is linked into the two libraries

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out=$(realpath -m -- "${1:-$root/target/pcache}")
target=$(realpath -m -- "${CARGO_TARGET_DIR:-$root/target}")

say() { printf 'module.sh: %s\n' "$*" >&2; }

found=$("$here/spdk.sh" find)
eval "$found"
say "building for SPDK $SPDK_VERSION in ${SPDK_DIR:-$SPDK_PREFIX} ($SPDK_LINKAGE)"

build() {
	local crate_type=$1
	shift
	(cd "$root" && cargo rustc --quiet --release --locked --lib --features spdk --crate-type "$crate_type" "$@")
}

mkdir -p "$out/pkgconfig"
build cdylib
install -m 755 "$target/release/libpcache.so" "$out/libspdk_bdev_pcache.so"

# What the module is good for: SPDK hears of it by constructors, and they must have survived the linker.
count=$(readelf -W -S "$out/libspdk_bdev_pcache.so" | awk '$2 == ".init_array" || $3 == ".init_array" { for (i = 1; i <= NF; i++) if ($i == ".init_array") { print $(i + 4); exit } }')
if ((16#${count:-0} < 9 * 8)); then
	say "error: the constructors that register the module are missing from libspdk_bdev_pcache.so"
	exit 1
fi

# The system libraries that Rust's runtime in a static library needs. Cargo tells them only when it has
# something to compile, so they are kept.
kept=$target/release/libpcache.native-static-libs
libs=$(build staticlib -- --print native-static-libs 2>&1 | sed -n 's/.*native-static-libs: //p' | tail -n 1)
if [[ -n $libs ]]; then
	printf '%s\n' "$libs" >"$kept"
elif [[ ! -s $kept ]]; then
	touch "$root/src/lib.rs"
	build staticlib -- --print native-static-libs 2>&1 | sed -n 's/.*native-static-libs: //p' | tail -n 1 >"$kept"
fi
libs=$(<"$kept")
install -m 644 "$target/release/libpcache.a" "$out/libspdk_bdev_pcache.a"

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/Cargo.toml" | head -n 1)
cat >"$out/pkgconfig/spdk_bdev_pcache.pc" <<PC
# The folder that this file's folder lies in.
libdir=\${pcfiledir}/..
# What Rust's runtime needs of the system.
system_libs=$libs

Name: spdk_bdev_pcache
Description: Persistent-memory write-back and read cache, an SPDK bdev module (built for SPDK $SPDK_VERSION)
Version: $version
Requires: spdk_bdev spdk_accel spdk_thread spdk_json spdk_jsonrpc spdk_rpc spdk_log spdk_util
Libs: -L\${libdir} -Wl,-u,pcache_module_anchor -l:libspdk_bdev_pcache.a
Libs.private: \${system_libs}
PC
install -m 755 "$here/pcache-run" "$out/pcache-run"

# What is linked in wants its notices to go with it.
host=$(rustc -vV | sed -n 's/^host: //p')
linked=(--quiet --locked --features spdk)
(cd "$root" && cargo metadata "${linked[@]}" --format-version 1 --filter-platform "$host") >"$target/release/metadata.json"
(cd "$root" && cargo tree "${linked[@]}" --edges normal,no-proc-macro --prefix none --format '{p}') |
	cut -d ' ' -f 1,2 | sort -u |
	/usr/bin/python3 "$here/licenses.py" "$root/LICENSE" "$target/release/metadata.json" >"$out/LICENSES"
say "done: $out"
