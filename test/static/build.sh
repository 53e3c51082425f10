#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# build.sh OUTPUT - links main.c, SPDK and pcache into one application, through pkg-config alone.
#
# SPDK registers its modules by constructors, so its libraries are linked whole; pcache's .pc file names the
# one symbol that pulls its constructors in.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$1

found=$("$root/spdk-sys/spdk.sh" find)
eval "$found"
if [[ $KIND == tree ]]; then
	PKG_CONFIG_PATH=$SPDK_DIR/build/lib/pkgconfig:$SPDK_DIR/dpdk/build/lib/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
fi
export PKG_CONFIG_PATH=$root/target/pcache/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}

spdk=(spdk_event spdk_event_bdev spdk_bdev_malloc spdk_bdev_aio spdk_env_dpdk)
read -ra cflags <<<"$(pkg-config --cflags "${spdk[@]}")"
read -ra spdk_libs <<<"$(pkg-config --libs "${spdk[@]}")"
read -ra pcache_libs <<<"$(pkg-config --libs spdk_bdev_pcache)"
read -ra system_libs <<<"$(pkg-config --libs --static spdk_syslibs) $(pkg-config --variable=system_libs spdk_bdev_pcache)"

# The crypto and compression libraries of a shared SPDK build lie in its tree, not where the system looks.
run_paths=()
for word in "${system_libs[@]}"; do
	[[ $word != -L* ]] || run_paths+=("-Wl,-rpath,${word#-L}")
done

mkdir -p "$(dirname "$out")"
cc -O2 -Wall -Werror "${cflags[@]}" -o "$out" "$here/main.c" \
	-Wl,--no-as-needed -Wl,--whole-archive -Wl,-Bstatic "${spdk_libs[@]}" -Wl,--no-whole-archive \
	"${pcache_libs[@]}" -Wl,-Bdynamic "${system_libs[@]}" "${run_paths[@]}"
