#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# spdk.sh - finds the SPDK that pcache is built and run with, or gets and builds one.
#
#   spdk.sh find     say which SPDK would be used (quick, no network); exit 1 if there is none
#   spdk.sh ensure   the same, but obtain and build one first if there is none
#   spdk.sh deps     install the Debian packages that SPDK's and pcache's builds need
#
# find and ensure print lines for the shell to evaluate, and nothing else, on stdout:
#
#   KIND=tree|pkgconfig       tree: a source tree with its build in it;
#                             pkgconfig: installed, reached through pkg-config
#   SPDK_DIR=...              the tree (empty for pkgconfig)
#   SPDK_PREFIX=...           where it is installed (empty for tree)
#   SPDK_LIBDIR=...           where its libraries are. The programs of a shared build need it in
#                             LD_LIBRARY_PATH: SPDK links them without a run path to it
#   SPDK_VERSION=26.01        from its include/spdk/version.h
#   SPDK_LINKAGE=shared|static
#   SPDK_ORIGIN=env|pkg-config|cache
#
# Searched in this order: the tree that $SPDK_DIR names; pkg-config; our own earlier build in
# ${XDG_CACHE_HOME:-~/.cache}/pcache/spdk; and then (ensure only) a new build there.
#
# Environment:
#   SPDK_DIR               a built SPDK tree to use. Set but unusable is an error.
#   PKG_CONFIG_PATH        as for pkg-config
#   XDG_CACHE_HOME         where our own build is kept
#   PCACHE_DEBIAN_MIRROR   Debian mirror to take the source from (default: that of this
#                          machine's apt configuration)
#   PCACHE_SPDK_JOBS       parallel compile jobs (default: number of processors)

# shellcheck disable=SC2317 # some functions are called through a trap or by a name in a variable
set -euo pipefail
# DPDK refuses drivers below a folder that anyone may write to; so does common sense.
umask 022

readonly MIN_VERSION=26.01
# Raised whenever the way we build changes, so that older builds of ours are made anew.
readonly RECIPE=1
# OCF is there for comparing pcache with SPDK's own cache module, io_uring for its bdev. The
# functional tests stay in (test/bdev/bdevio is one of them), the unit tests only cost time.
readonly CONFIGURE_ARGS=(--with-shared --with-ocf --with-uring --without-rbd --disable-unit-tests)
# A plain environment for SPDK's own build: another python3 coming first on PATH (pyenv's, a
# venv's) lacks pyelftools, and CFLAGS or MAKEFLAGS of our caller are not meant for SPDK.
readonly BUILD_VARS=(PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME="${HOME:-/root}" LC_ALL=C SHELL=/bin/bash)

# Debian's source package of Ceph carries a whole SPDK with all its submodules.
readonly SRC_PACKAGE=ceph
readonly SRC_FOLDER=src/nvmeof/gateway/spdk
readonly SRC_SUITES=(unstable testing stable experimental)
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

readonly SPDK_PACKAGES=(
	gcc g++ make autoconf automake libtool pkg-config nasm meson ninja-build patchelf help2man
	python3 python3-pyelftools xz-utils
	libaio-dev libcunit1-dev libfuse3-dev libjson-c-dev libkeyutils-dev libncurses-dev
	libnuma-dev libssl-dev liburing-dev uuid-dev
)
# bindgen loads libclang and needs the compiler's own headers.
readonly PCACHE_PACKAGES=(clang libclang-dev)
readonly ALL_PACKAGES=("${SPDK_PACKAGES[@]}" "${PCACHE_PACKAGES[@]}")

# What our own build must have made: all that pcache's build, tests and benchmarks use.
readonly OWN_PRODUCTS=(
	build/bin/spdk_tgt build/bin/nvmf_tgt build/bin/iscsi_tgt build/bin/vhost
	build/examples/bdevperf test/bdev/bdevio/bdevio scripts/rpc.py build/lib/libspdk_bdev.so
	build/lib/libspdk_bdev_ocf.so include/spdk/version.h python/spdk/version.py
)

SECONDS=0
CHILD=

say() { printf 'spdk.sh: [%2d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" >&2; }
warn() { printf 'spdk.sh: warning: %s\n' "$*" >&2; }
die() {
	printf 'spdk.sh: error: %s\n' "$1" >&2
	shift
	local line
	for line in "$@"; do printf 'spdk.sh:   %s\n' "$line" >&2; done
	exit 1
}

# ---- what is there already ------------------------------------------------------------------

# The version of the SPDK whose headers are in $1 ("" if they say none). A tree that was never
# built has no version.h yet, only the file VERSION beside include/.
version_in() {
	local file=$1/spdk/version.h word key value major='' minor='' patch=0 suffix=''
	if [[ -r $file ]]; then
		while read -r word key value; do
			[[ $word == '#define' ]] || continue
			value=${value%%/\**}
			value=${value//[[:space:]\"]/}
			case $key in
				SPDK_VERSION_MAJOR) major=$value ;;
				SPDK_VERSION_MINOR) minor=$value ;;
				SPDK_VERSION_PATCH) patch=$value ;;
				SPDK_VERSION_SUFFIX) suffix=$value ;;
			esac
		done <"$file"
	elif [[ -r $1/../VERSION ]]; then
		IFS=. read -r major minor patch <"$1/../VERSION" || true
		[[ $patch == *-* ]] && suffix=-${patch#*-}
		patch=${patch%%-*}
	fi
	[[ $major =~ ^[0-9]+$ && $minor =~ ^[0-9]+$ ]] || return 0
	printf '%d.%02d' "$((10#$major))" "$((10#$minor))"
	if [[ ${patch:-0} =~ ^[0-9]+$ ]] && ((10#${patch:-0})); then printf '.%d' "$((10#$patch))"; fi
	printf '%s' "$suffix"
}

# Is version $1 (26.01, 26.05.1, 26.09-pre ...) at least MIN_VERSION?
version_ok() {
	[[ $1 =~ ^([0-9]+)\.([0-9]+) ]] || return 1
	local have=$((10#${BASH_REMATCH[1]} * 100 + 10#${BASH_REMATCH[2]}))
	((have >= 10#${MIN_VERSION%.*} * 100 + 10#${MIN_VERSION#*.}))
}

# Prints the first of $1 and the folders above it that anyone may write to.
world_writable_part() {
	local dir=$1 mode
	while [[ $dir != / ]]; do
		if [[ -e $dir ]]; then
			mode=$(stat -c %a "$dir")
			if ((8#$mode & 2)); then
				printf '%s' "$dir"
				return 0
			fi
		fi
		dir=$(dirname "$dir")
	done
	return 1
}

# Prints what makes $1 no usable built SPDK tree; nothing if it is one.
tree_fault() {
	local dir=$1 version
	if [[ ! -d $dir ]]; then
		echo "there is no such folder"
	elif [[ ! -e $dir/include/spdk/bdev_module.h ]]; then
		echo "it has no include/spdk/bdev_module.h, so it is no SPDK source tree"
	elif [[ ! -e $dir/build/lib/libspdk_bdev.so && ! -e $dir/build/lib/libspdk_bdev.a ]]; then
		echo "it has no build/lib/libspdk_bdev.so nor .a: SPDK is not built there"
	elif [[ ! -x $dir/build/bin/spdk_tgt ]]; then
		echo "it has no build/bin/spdk_tgt: its build is not complete"
	else
		version=$(version_in "$dir/include")
		version_ok "$version" || echo "it is SPDK ${version:-of unknown version}, pcache needs $MIN_VERSION or later"
	fi
}

# The finders set these and return 0, or return 1.
KIND='' DIR='' PREFIX='' LIBDIR='' VERSION='' ORIGIN=''

find_env() {
	[[ -n ${SPDK_DIR:-} ]] || return 1
	local dir fault
	dir=$(realpath -m -- "$SPDK_DIR")
	fault=$(tree_fault "$dir")
	# Going on to another SPDK than the one asked for would only surprise later.
	[[ -z $fault ]] || die "SPDK_DIR=$SPDK_DIR is not usable: $fault" \
		"Right would be the top folder of an SPDK $MIN_VERSION or later that has been built in place" \
		"(./configure --with-shared && make), or SPDK_DIR unset to look elsewhere."
	KIND=tree DIR=$dir PREFIX='' LIBDIR=$dir/build/lib ORIGIN=env
	VERSION=$(version_in "$dir/include")
	local open
	if [[ -e $LIBDIR/libspdk_bdev.so ]] && open=$(world_writable_part "$dir"); then
		warn "SPDK_DIR is below $open, which anyone may write to: DPDK will refuse to load its drivers from there"
	fi
}

find_pkgconfig() {
	command -v pkg-config >/dev/null || return 1
	pkg-config --exists spdk_bdev || {
		# Not there is one thing, there and broken another.
		if [[ $(pkg-config --list-all) == *spdk_bdev\ * ]]; then
			warn "pkg-config's SPDK is not usable: $(pkg-config --print-errors --exists spdk_bdev 2>&1 | tail -n 1)"
		fi
		return 1
	}
	local include='' lib='' version word cflags libs
	# SPDK's .pc files have no variables, and their Version is that of each library's ABI: the
	# folders are in their flags, and the headers know the release. (System folders, which
	# pkg-config leaves out as a rule, are of interest here too.)
	cflags=$(PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 pkg-config --cflags-only-I spdk_bdev 2>/dev/null) || return 1
	libs=$(PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 pkg-config --libs-only-L spdk_bdev 2>/dev/null) || return 1
	for word in $cflags; do
		if [[ -z $include && -e ${word#-I}/spdk/bdev_module.h ]]; then include=$(realpath -m -- "${word#-I}"); fi
	done
	for word in $libs; do
		if [[ -z $lib ]] && compgen -G "${word#-L}/libspdk_bdev.*" >/dev/null; then lib=$(realpath -m -- "${word#-L}"); fi
	done
	if [[ -z $include || -z $lib ]]; then
		warn "pkg-config knows an SPDK whose folders ($cflags $libs) have no spdk/bdev_module.h or no libspdk_bdev: passed over"
		return 1
	fi
	version=$(version_in "$include")
	if ! version_ok "$version"; then
		warn "pkg-config's SPDK in ${include%/*} is ${version:-of unknown version}, pcache needs $MIN_VERSION or later: passed over"
		return 1
	fi
	ORIGIN=pkg-config VERSION=$version LIBDIR=$lib
	if [[ $include == */build/include && -z $(tree_fault "${include%/build/include}") ]]; then
		# Not installed: the .pc files of a tree's own build.
		KIND=tree DIR=${include%/build/include} PREFIX=''
	else
		KIND=pkgconfig DIR='' PREFIX=${include%/include}
	fi
}

# Sets CACHE, the folder of our own build.
set_cache_folder() {
	local base=${XDG_CACHE_HOME:-}
	# The XDG specification says to ignore a relative one.
	[[ $base == /* ]] || base=${HOME:?HOME is not set, nor is XDG_CACHE_HOME}/.cache
	# Resolved, since DPDK checks the permissions of the real folders.
	CACHE=$(realpath -m -- "$base/pcache/spdk")
	readonly CACHE
	TREE=$CACHE/tree
	readonly TREE
}

cpu_flags() { awk '/^(flags|Features)[[:space:]]*:/ { sub(/^[^:]*:[[:space:]]*/, ""); print; exit }' /proc/cpuinfo; }

os_name() {
	local ID='' VERSION_ID='' key value
	while IFS='=' read -r key value; do
		value=${value//\"/}
		case $key in
			ID) ID=$value ;;
			VERSION_ID) VERSION_ID=$value ;;
		esac
	done </etc/os-release
	printf '%s' "$ID $VERSION_ID $(uname -m)"
}

# What our build depends on and its files don't show: a build is only good where all this fits.
write_identity() {
	printf 'recipe=%s\npath=%s\nos=%s\nflags=%s\n' "$RECIPE" "$TREE" "$(os_name)" "$(cpu_flags)"
}

# Prints why a build with the identity in file $1 can't be used here; nothing if it can.
identity_fault() {
	local key value flag flags recipe='' path='' os='' built_flags=''
	while IFS='=' read -r key value; do
		case $key in
			recipe) recipe=$value ;;
			path) path=$value ;;
			os) os=$value ;;
			flags) built_flags=$value ;;
		esac
	done <"$1"
	if [[ $recipe != "$RECIPE" ]]; then
		echo "this spdk.sh builds it differently (recipe $RECIPE, not ${recipe:-unknown})"
	elif [[ $path != "$TREE" ]]; then
		# The run paths in the binaries are absolute.
		echo "it was built in $path and then moved"
	elif [[ $os != "$(os_name)" ]]; then
		echo "it was built on $os and links that system's libraries"
	else
		# It is compiled for the processor that it was built on (-march=native): on one that
		# lacks any of the features it would die of an illegal instruction. More is fine.
		flags=" $(cpu_flags) "
		for flag in $built_flags; do
			if [[ $flags != *" $flag "* ]]; then
				echo "it was built for a processor with '$flag', which this one lacks"
				return
			fi
		done
	fi
}

# Prints the first of our own build's products that is missing.
missing_product() {
	local file
	for file in "${OWN_PRODUCTS[@]}"; do
		if [[ ! -s $TREE/$file ]]; then
			printf '%s' "$file"
			return 0
		fi
	done
	return 1
}

OWN_FAULT=''
find_own() {
	local missing
	OWN_FAULT=''
	[[ -f $CACHE/built ]] || return 1
	OWN_FAULT=$(identity_fault "$CACHE/built")
	if [[ -z $OWN_FAULT ]] && missing=$(missing_product); then OWN_FAULT="it lacks $missing"; fi
	[[ -z $OWN_FAULT ]] || return 1
	KIND=tree DIR=$TREE PREFIX='' LIBDIR=$TREE/build/lib ORIGIN=cache
	VERSION=$(version_in "$TREE/include")
}

find_any() { find_env || find_pkgconfig || find_own; }

print_result() {
	local linkage=static
	[[ ! -e $LIBDIR/libspdk_bdev.so ]] || linkage=shared
	printf '%s=%q\n' KIND "$KIND" SPDK_DIR "$DIR" SPDK_PREFIX "$PREFIX" SPDK_LIBDIR "$LIBDIR" \
		SPDK_VERSION "$VERSION" SPDK_LINKAGE "$linkage" SPDK_ORIGIN "$ORIGIN"
}

# ---- packages -------------------------------------------------------------------------------

# Prints those of the packages that are not installed, one a line.
missing_packages() {
	# A package that was removed, or is only known, is listed too, hence the look at its state.
	# dpkg-query fails when any name is unknown to it, and still lists the others.
	local known
	known=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true)
	local package
	for package in "$@"; do
		[[ $'\n'$known$'\n' == *$'\n'"$package installed"$'\n'* ]] || echo "$package"
	done
}

# Prints those of the packages that apt has no version of to install, one a line.
without_candidate() {
	local package
	for package in "$@"; do
		# Not through a pipe: one that is read only as far as the match ends apt-cache with SIGPIPE.
		[[ $(LC_ALL=C apt-cache policy "$package" 2>/dev/null) == *$'\n  Candidate: '[!\(]* ]] || echo "$package"
	done
}

apt_install() {
	# The lock (descriptor 9) must not live on in a service that a package starts.
	DEBIAN_FRONTEND=noninteractive apt-get -y --no-install-recommends \
		-o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 install "$@" 9>&-
}

has_libclang() {
	[[ -n ${LIBCLANG_PATH:-} ]] || command -v llvm-config >/dev/null || compgen -G '/usr/lib*/llvm-*/lib/libclang*.so*' >/dev/null ||
		[[ $(ldconfig -p 2>/dev/null || true) == *libclang* ]]
}

# Installs those of the packages that are missing.
install_deps() {
	if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
		die "this is no Debian system, so spdk.sh can't install what is needed" \
			"Build SPDK $MIN_VERSION or later yourself and set SPDK_DIR to its tree."
	fi
	local -a missing none
	mapfile -t missing < <(missing_packages "$@")
	((${#missing[@]})) || return 0
	((EUID == 0)) || die "these packages are missing, and installing them needs root:" \
		"${missing[*]}" "Run as root: apt-get install ${missing[*]}"

	local log
	log=$(mktemp "${TMPDIR:-/tmp}/pcache-deps.XXXXXX.log")
	say "installing ${#missing[@]} Debian packages: ${missing[*]}"
	local updated=
	mapfile -t none < <(without_candidate "${missing[@]}")
	if ((${#none[@]})); then
		say "updating apt's package lists"
		apt-get -o DPkg::Lock::Timeout=120 update >>"$log" 2>&1 9>&- || fail_with_log "$log" "apt-get update failed"
		updated=yes
		mapfile -t none < <(without_candidate "${missing[@]}")
		if ((${#none[@]})); then
			rm -f "$log"
			die "apt's package lists don't have: ${none[*]}" \
				"Add the archive that has them to apt's sources, or build SPDK yourself and set SPDK_DIR."
		fi
	fi
	if ! apt_install "${missing[@]}" >>"$log" 2>&1; then
		# Lists older than the archive name files that are gone from it.
		[[ -z $updated ]] || fail_with_log "$log" "apt-get install failed"
		say "that failed; once more with updated package lists"
		apt-get -o DPkg::Lock::Timeout=120 update >>"$log" 2>&1 9>&- || fail_with_log "$log" "apt-get update failed"
		apt_install "${missing[@]}" >>"$log" 2>&1 || fail_with_log "$log" "apt-get install failed"
	fi
	mapfile -t missing < <(missing_packages "${missing[@]}")
	((${#missing[@]} == 0)) || fail_with_log "$log" "still not installed: ${missing[*]}"
	rm -f "$log"
}

# ---- running long things --------------------------------------------------------------------

fail_with_log() {
	local log=$1
	shift
	{
		printf 'spdk.sh: error: %s\n' "$*"
		# With parallel jobs the first error may be far above the end.
		grep -nE '(: (fatal )?error:|undefined reference|\*\*\* .*Error|^E: |^ERROR)' "$log" 2>/dev/null | head -n 8 |
			sed 's/^/spdk.sh:   line /' || true
		printf 'spdk.sh: the last lines of the log:\n'
		tail -n 25 "$log" 2>/dev/null | sed 's/^/    /' || true
		printf 'spdk.sh: the whole log: %s\n' "$log"
	} >&2
	exit 1
}

stop_child() {
	trap - INT TERM HUP
	# The terminal's Ctrl-C doesn't reach it, being in a session of its own. The whole group: make
	# and ninja heed TERM and delete half-written files, but make doesn't pass it on to ninja.
	if [[ -n $CHILD ]]; then
		kill -TERM -- "-$CHILD" 2>/dev/null || true
		wait "$CHILD" 2>/dev/null || true
	fi
	say "interrupted; the next run goes on from here"
	exit 130
}

# watch LABEL LOG COUNTER COMMAND...: runs the command (a program, no function: setsid
# is to run it), with its output in LOG, and tells every 10 seconds what COUNTER
# (a function) prints. Its exit status is the command's.
watch() {
	local label=$1 log=$2 counter=$3 rc=0 next
	shift 3
	# It keeps the lock: should we be killed, no other run starts in its tree before it ends.
	setsid "$@" >"$log" 2>&1 </dev/null &
	CHILD=$!
	next=$((SECONDS + 10))
	while kill -0 "$CHILD" 2>/dev/null; do
		sleep 0.3
		if ((SECONDS >= next)); then
			say "$label: $($counter "$log")"
			next=$((SECONDS + 10))
		fi
	done
	wait "$CHILD" || rc=$?
	CHILD=
	return "$rc"
}

last_line() { tail -n 5 "$1" | tr -s ' \t\r' ' ' | awk 'NF { line = $0 } END { print substr(line, 1, 70) }'; }
count_lines() { printf '%d lines of output, now: %s' "$(wc -l <"$1")" "$(last_line "$1")"; }
count_make() {
	# DPDK prints [step/steps], SPDK a line for each file. The total is that of SPDK 26.01.
	printf '%d of about 1270 steps, now: %s' "$(grep -cE '^(  [A-Z]|\[[0-9]+/)' "$1")" "$(last_line "$1")"
}
count_download() { printf '%s so far' "$(du -sh "$CACHE/dl" 2>/dev/null | cut -f 1)"; }
count_extract() { printf '%s so far' "$(du -sh "$CACHE/extract.part" 2>/dev/null | cut -f 1)"; }

# A stage's stamp is written last, and moved into place, so that it is there only if all of the
# stage is.
stage_done() { [[ -f $CACHE/stage/$1 ]]; }
mark_stage() {
	cat >"$CACHE/stage/.$1.new"
	sync -f "$CACHE/stage/.$1.new"
	mv -f "$CACHE/stage/.$1.new" "$CACHE/stage/$1"
}

# ---- the source -----------------------------------------------------------------------------

# Prints the Debian mirror to ask: the one this machine already uses knows best.
mirror() {
	# shellcheck disable=SC2016 # the $(...) are apt's
	local uri by_label='$(ORIGIN)/$(LABEL) $(REPO_URI)' by_uri='$(REPO_URI)'
	if [[ -n ${PCACHE_DEBIAN_MIRROR:-} ]]; then
		printf '%s' "${PCACHE_DEBIAN_MIRROR%/}/"
		return
	fi
	uri=$(apt-get indextargets --format "$by_label" 'Created-By: Packages' 2>/dev/null |
		awk '$1 == "Debian/Debian" { print $2; exit }')
	[[ -n $uri ]] || uri=$(apt-get indextargets --format "$by_uri" 'Created-By: Packages' 2>/dev/null |
		awk '/\/debian\/?$/ { print; exit }')
	[[ -n $uri ]] || return 1
	printf '%s' "$uri"
}

# An apt of our own, in a folder of ours: neither the machine's sources and lists change, nor do
# its hooks run. Only how to reach the network (proxies) and whether the clock and the age of the
# lists matter (a machine bound to an old snapshot says no) are taken over from it. Signatures are
# always checked.
setup_apt() {
	local apt=$CACHE/apt uri
	uri=$(mirror) || die "this machine's apt knows no Debian mirror to take the SPDK source from" \
		"Set PCACHE_DEBIAN_MIRROR to one, or SPDK_DIR to a built tree of SPDK $MIN_VERSION or later."
	[[ -r $KEYRING ]] || die "no $KEYRING: without it the source's signature can't be checked" \
		"Install the package debian-archive-keyring, or set SPDK_DIR to a built tree of SPDK $MIN_VERSION or later."
	rm -rf "$apt"
	mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$apt/parts" "$CACHE/dl"
	say "Debian mirror: $uri"
	{
		apt-config dump 2>/dev/null | grep -E '^Acquire::(http|https|ftp|ForceIPv|Check-(Valid-Until|Date))' || true
		# As root apt would fetch as the user _apt, which can't reach below a home folder; it then
		# warns and goes on as root anyway. Say so at once. All that is fetched is verified.
		printf '%s "%s";\n' APT::Sandbox::User root Dir::Etc::main /dev/null Dir::Etc::parts "$apt/parts" \
			Dir::Etc::sourcelist "$apt/sources.list" Dir::Etc::sourceparts "$apt/parts" \
			Dir::State "$apt/state" Dir::State::lists "$apt/state/lists" Dir::Cache "$apt/cache" \
			Acquire::Languages none Acquire::Retries 3
	} >"$apt/apt.conf"
	MIRROR=$uri
}

own_apt() { env APT_CONFIG="$CACHE/apt/apt.conf" LC_ALL=C "$@"; }

# Prints "SHA256 SIZE FILE VERSION" for each version that the suite lists, newest first.
list_sources() {
	own_apt apt-cache showsrc --only-source "$SRC_PACKAGE" 2>/dev/null | awk '
		/^Version:/ { version = $2 }
		/^[^ ]/ { sums = /^Checksums-Sha256:/ }
		sums && $3 ~ /\.orig\.tar\.[a-z0-9]+$/ { file = $1 " " $2 " " $3 }
		/^$/ { if (file != "") print file, version; file = version = "" }
		END { if (file != "") print file, version }' | sort -k4,4Vr
}

file_is() { # FILE SHA256
	[[ -f $1 ]] && printf '%s  %s\n' "$2" "$1" | sha256sum --check --status
}

# Takes the SPDK out of the archive $1: 0 when it is in $TREE, 1 when the archive has none for us.
extract() {
	local part=$CACHE/extract.part log=$CACHE/log/extract.log dir version
	rm -rf "$part" "$TREE"
	mkdir -p "$part"
	say "extracting SPDK from ${1##*/}"
	# As root tar would keep the packager's owner and group-writable folders.
	if ! watch extract "$log" count_extract tar --extract --file="$1" --directory="$part" \
		--no-same-owner --no-same-permissions --wildcards "*/$SRC_FOLDER"; then
		if grep -q 'Not found in archive' "$log"; then
			say "it has no $SRC_FOLDER"
			return 1
		fi
		fail_with_log "$log" "extracting ${1##*/} failed"
	fi
	dir=$(compgen -G "$part/*/$SRC_FOLDER" | head -n 1)
	version=$(version_in "$dir/include")
	if ! version_ok "$version"; then
		say "its SPDK is ${version:-of unknown version}, too old"
		return 1
	fi
	local file
	for file in configure dpdk/meson.build isa-l/autogen.sh isa-l-crypto/autogen.sh ocf/Makefile include/spdk/bdev_module.h; do
		if [[ ! -e $dir/$file ]]; then
			say "its SPDK lacks $file"
			return 1
		fi
	done
	mv "$dir" "$TREE"
	rm -rf "$part"
	say "SPDK $version"
}

get_source() {
	local suite sha size file version log=$CACHE/log/download.log tried=' '
	stage_done extracted && return 0

	# An archive that an earlier run has fetched.
	if stage_done downloaded; then
		read -r sha size file version <"$CACHE/stage/downloaded"
		if file_is "$CACHE/dl/$file" "$sha" && extract "$CACHE/dl/$file"; then
			mark_stage extracted <<<"$SRC_PACKAGE $version"
			return 0
		fi
		rm -f "$CACHE/stage/downloaded"
	fi

	setup_apt
	for suite in "${SRC_SUITES[@]}"; do
		say "looking for the source package $SRC_PACKAGE in Debian $suite"
		echo "deb-src [signed-by=$KEYRING] $MIRROR $suite main" >"$CACHE/apt/sources.list"
		if ! watch lists "$log" count_lines env APT_CONFIG="$CACHE/apt/apt.conf" LC_ALL=C \
			apt-get -o APT::Update::Error-Mode=any update; then
			tail -n 3 "$log" | sed 's/^/    /' >&2
			say "no list of $suite to be had (log: $log)"
			continue
		fi
		while read -r sha size file version; do
			[[ $tried != *" $file "* ]] || continue
			tried+="$file "
			if ! file_is "$CACHE/dl/$file" "$sha"; then
				say "downloading $file ($((size / 1000000)) MB)"
				# The archive alone: that is all we want, and the one file that is surely there.
				# apt checks it against the signed index; we check once more what is on the disk.
				if ! watch download "$log" count_download env -C "$CACHE/dl" APT_CONFIG="$CACHE/apt/apt.conf" LC_ALL=C \
					apt-get -o Dpkg::Use-Pty=0 source --download-only --tar-only "$SRC_PACKAGE=$version" ||
					! file_is "$CACHE/dl/$file" "$sha"; then
					tail -n 3 "$log" | sed 's/^/    /' >&2
					say "that failed (log: $log)"
					continue
				fi
			fi
			mark_stage downloaded <<<"$sha $size $file $version"
			if extract "$CACHE/dl/$file"; then
				mark_stage extracted <<<"$SRC_PACKAGE $version"
				return 0
			fi
			rm -f "$CACHE/stage/downloaded" "$CACHE/dl/$file"
		done < <(list_sources)
	done
	die "no SPDK source to be had: no version of Debian's $SRC_PACKAGE that could be fetched has one (tried:${tried:- none})" \
		"Get SPDK $MIN_VERSION or later another way, build it (./configure --with-shared && make)" \
		"and set SPDK_DIR to its tree. The last log: $log"
}

# Ceph's copy is made for a build with RBD. Two of its files don't go without.
mend_source() {
	stage_done patched && return 0
	local file=$TREE/lib/nvmf/subsystem_rbd_resrv.c map=$TREE/lib/notify/spdk_notify.map
	# Uses a log component that only the RBD bdev module registers.
	if [[ -f $file ]] && grep -q 'LOG(reservation,' "$file" &&
		! grep -rqF 'SPDK_LOG_REGISTER_COMPONENT(reservation)' "$TREE/lib"; then
		say "mending lib/nvmf/subsystem_rbd_resrv.c (unregistered log component)"
		printf '\nSPDK_LOG_REGISTER_COMPONENT(reservation)\n' >>"$file"
	fi
	# A function that another library calls is not exported.
	if [[ -f $map ]] && grep -q '^spdk_notify_type_register_once(' "$TREE/lib/notify/notify.c" &&
		! grep -qw spdk_notify_type_register_once "$map"; then
		say "mending lib/notify/spdk_notify.map (function not exported)"
		sed -i 's/^\([[:space:]]*\)spdk_notify_type_register;/&\n\1spdk_notify_type_register_once;/' "$map"
		grep -qw spdk_notify_type_register_once "$map" || die "could not mend $map"
	fi
	mark_stage patched </dev/null
}

# ---- the build ------------------------------------------------------------------------------

configure_tree() {
	stage_done configured && return 0
	local log=$CACHE/log/configure.log
	say "configuring: ${CONFIGURE_ARGS[*]}"
	if ! watch configure "$log" count_lines env -i -C "$TREE" "${BUILD_VARS[@]}" ./configure "${CONFIGURE_ARGS[@]}"; then
		# Its steps log to files of their own and it doesn't say what was in them.
		local part
		for part in "$TREE"/.spdk-*.log; do
			if [[ -f $part ]]; then { echo "== $part"; tail -n 15 "$part"; } >>"$log"; fi
		done
		fail_with_log "$log" "SPDK's configure failed"
	fi
	mark_stage configured </dev/null
}

# 0: built; 1: make failed (its log tells).
make_tree() {
	local log=$CACHE/log/make.log jobs=${PCACHE_SPDK_JOBS:-$(nproc)} missing rc=0
	: >"$CACHE/stage/making"
	say "building with $jobs jobs (about four minutes on two processors); log: $log"
	watch make "$log" count_make env -i -C "$TREE" "${BUILD_VARS[@]}" make -j"$jobs" || rc=$?
	if missing=$(missing_product); then
		echo "ERROR: make ended with status $rc and $missing is missing" >>"$log"
		return 1
	fi
	# The last step of make is about python packaging; what we use of it was checked just now.
	((rc == 0)) || warn "make ended with status $rc, but all that is needed was built (log: $log)"
	if missing=$(LD_LIBRARY_PATH=$TREE/build/lib ldd "$TREE/build/bin/spdk_tgt" | grep 'not found'); then
		printf 'ERROR: spdk_tgt lacks libraries: %s\n' "$missing" >>"$log"
		return 1
	fi
	# SPDK's bdev modules require the OCF library through pkg-config, and its build writes no .pc
	# file for it: without one pkg-config refuses all of the tree's libraries.
	local pc=$TREE/build/lib/pkgconfig/spdk_ocfenv.pc
	if [[ ! -e $pc ]]; then
		printf '%s\n' 'Description: SPDK ocfenv library' 'Name: spdk_ocfenv' 'Version: 1.0' \
			"Libs: -L$TREE/build/lib -lspdk_ocfenv" 'Requires:' "Cflags: -I$TREE/build/include" >"$pc"
	fi
}

build_own() {
	local open fault
	if open=$(world_writable_part "$CACHE"); then
		die "the cache folder $CACHE is below $open, which anyone may write to" \
			"DPDK refuses to load its drivers from such a place, so SPDK built there would not run." \
			"Set XDG_CACHE_HOME to a folder that only you can write to."
	fi
	mkdir -p "$CACHE/stage" "$CACHE/log"

	exec 9>"$CACHE/lock"
	if ! flock --nonblock 9; then
		say "another run is building in $CACHE; waiting for it"
		flock 9
	fi
	# That other run may have done it all.
	find_own && return 0
	[[ -z $OWN_FAULT ]] || say "our build in $TREE is of no use now: $OWN_FAULT"
	rm -f "$CACHE/built"

	# Does what an unfinished run left fit what is to be built now? A finished one that is of no
	# use has nothing left either.
	if [[ -f $CACHE/stage/identity ]]; then
		fault=$(identity_fault "$CACHE/stage/identity")
	else
		fault="no unfinished build"
	fi
	if [[ -n $fault || -n $OWN_FAULT ]]; then
		rm -rf "$TREE" "$CACHE"/stage/{extracted,patched,configured,making}
		write_identity | mark_stage identity
	fi

	local free
	free=$(df --output=avail -k "$CACHE" | tail -n 1)
	((free > 3 * 1024 * 1024)) || warn "only $((free / 1024)) MiB are free in $CACHE; the build needs about 3 GiB"

	trap stop_child INT TERM HUP
	install_deps "${ALL_PACKAGES[@]}"
	local resumed=
	[[ ! -f $CACHE/stage/making ]] || resumed=yes
	get_source
	mend_source
	configure_tree
	if ! make_tree; then
		[[ -n $resumed ]] || fail_with_log "$CACHE/log/make.log" "SPDK's make failed"
		# A run that was killed hard may have left half-written files; make takes them for done.
		say "make failed in the tree of an interrupted run; once more from its start"
		rm -rf "$TREE" "$CACHE"/stage/{extracted,patched,configured,making}
		get_source
		mend_source
		configure_tree
		make_tree || fail_with_log "$CACHE/log/make.log" "SPDK's make failed"
	fi
	trap - INT TERM HUP

	{
		write_identity
		printf 'source=%s\nbuilt=%s\n' "$(cat "$CACHE/stage/extracted")" "$(date -u +%FT%TZ)"
	} >"$CACHE/.built.new"
	sync -f "$CACHE/.built.new"
	mv -f "$CACHE/.built.new" "$CACHE/built"
	rm -rf "$CACHE/dl" "$CACHE/apt" "$CACHE/extract.part" "$CACHE/stage"
	find_own || die "the build in $TREE is not usable: ${OWN_FAULT:-no stamp}"
	say "SPDK $VERSION built in $TREE ($(du -sh "$TREE" | cut -f 1))"
}

# ---- commands -------------------------------------------------------------------------------

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

cmd_find() {
	if ! find_any; then
		if [[ -n $OWN_FAULT ]]; then
			die "no usable SPDK: our own build in $TREE can't be used: $OWN_FAULT" "'$0 ensure' builds it anew."
		fi
		die "no SPDK found" "'$0 ensure' gets and builds one," \
			"or set SPDK_DIR to a built tree of SPDK $MIN_VERSION or later."
	fi
	print_result
}

cmd_ensure() {
	if ! find_any; then
		build_own
	elif [[ $ORIGIN == cache ]] && command -v dpkg-query >/dev/null; then
		# The folder can outlive the machine's packages (a restored cache): its libraries are needed.
		install_deps "${ALL_PACKAGES[@]}"
	elif [[ $ORIGIN != cache ]] && ! has_libclang; then
		# An SPDK that somebody else has built.
		command -v apt-get >/dev/null || die "there is no libclang, which bindgen needs" \
			"Install your system's clang with its library, or set LIBCLANG_PATH to the library's folder."
		install_deps "${PCACHE_PACKAGES[@]}"
	fi
	print_result
}

main() {
	set_cache_folder
	case ${1:-} in
		find) cmd_find ;;
		ensure) cmd_ensure ;;
		deps) install_deps "${ALL_PACKAGES[@]}" ;;
		-h | --help | help) usage ;;
		*)
			usage >&2
			exit 2
			;;
	esac
	# Not left to the end of the file: bash reads a script as it goes, and this one may have been
	# changed in the minutes that it took.
	exit 0
}

main "$@"
