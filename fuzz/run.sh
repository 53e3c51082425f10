#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# run.sh - builds and runs the fuzz targets with the stable toolchain, without cargo-fuzz.
#
#   run.sh build               build all targets
#   run.sh smoke [TARGET...]   replay the corpus, then fuzz for a moment, with nearly the same inputs each time
#   run.sh fuzz [TARGET...]    fuzz for long
#   run.sh merge [TARGET...]   put the few inputs that reach most of what was reached into fuzz/corpus
#
# Whoever has cargo-fuzz can use that instead: the layout is its own.
#
# Environment:
#   FUZZ_SECONDS   how long each target fuzzes in a long run (600); a smoke has a number of inputs, 10 to 25 seconds of them
#   FUZZ_SEED      what the inputs of a smoke are drawn from (1), not 0; a long run draws a new one
#   FUZZ_ASAN      0: without AddressSanitizer, which costs half of the speed

set -euo pipefail
cd "$(dirname "$0")"

readonly ALL=(media_recovery media_mutations engine_ops rpc_params)
readonly HOST=x86_64-unknown-linux-gnu
# What a long run adds to the corpus; not committed.
readonly FOUND=target/corpus
# The same of a smoke, which begins with the committed inputs alone and one seed: a run for every change tells what the change has broken.
readonly FOUND_BY_SMOKE=target/smoke
readonly ARTIFACTS=artifacts
# A single input may not take longer, or more memory, than this.
readonly TIMEOUT_S=10 RSS_MB=1024 MALLOC_MB=256
# Inputs that a merge leaves, for each target.
readonly MERGED_MAX=14
# Inputs of the committed corpus are at most as long as this, in bytes.
declare -rA LEN_MAX=([media_recovery]=16384 [media_mutations]=1024 [engine_ops]=4096 [rpc_params]=1024)
# Inputs of a smoke, those of the corpus included.
declare -rA SMOKE_RUNS=([media_recovery]=4000 [media_mutations]=800 [engine_ops]=150 [rpc_params]=400000)

# What cargo-fuzz passes. The flags are unstable, so the compiler is told to take them nevertheless.
flags=(
	--cfg fuzzing -Cpasses=sancov-module
	-Cllvm-args=-sanitizer-coverage-level=4
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters
	-Cllvm-args=-sanitizer-coverage-pc-table
	-Cllvm-args=-sanitizer-coverage-trace-compares
	-Ccodegen-units=1 -Cdebug-assertions
)
if [[ ${FUZZ_ASAN:-1} == 1 ]]; then
	flags+=(-Zsanitizer=address)
fi

build() {
	# With a target named, build scripts and macros are not instrumented.
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" cargo build --release --quiet --target "$HOST" --bins
}

# Runs a target; everything it says goes to its log.
run() {
	local target=$1
	shift
	mkdir -p target/log "$ARTIFACTS/$target"
	ASAN_OPTIONS=${ASAN_OPTIONS:-quarantine_size_mb=16:detect_leaks=1} \
		"target/$HOST/release/$target" -timeout=$TIMEOUT_S -rss_limit_mb=$RSS_MB \
		-malloc_limit_mb=$MALLOC_MB -max_len="${LEN_MAX[$target]}" -print_final_stats=1 \
		-artifact_prefix="$ARTIFACTS/$target/" "$@" >"target/log/$target" 2>&1
}

# fuzz smoke|fuzz TARGET: fuzzes, for a moment or for long, and says in a line what came of it.
fuzz() {
	local mode=$1 target=$2 log=target/log/$2 found options runs inputs artifact
	if [[ $mode == smoke ]]; then
		found=$FOUND_BY_SMOKE/$target
		rm -rf "$found"
		# Nothing that goes by the clock: what others add to the corpus meanwhile is not looked for.
		options=(-seed="${FUZZ_SEED:-1}" -runs="${SMOKE_RUNS[$target]}" -reload=0)
	else
		found=$FOUND/$target
		options=(-max_total_time="${FUZZ_SECONDS:-600}")
	fi
	mkdir -p "$found"
	if run "$target" "${options[@]}" "$found" "corpus/$target"; then
		runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
		inputs=$(sed -n 's/.* corp: \([0-9]*\).*/\1/p' "$log" | tail -n 1)
		printf '%-16s %8s runs, %5s inputs in the corpus, 0 crashes\n' "$target" "$runs" "$inputs"
		return 0
	fi
	artifact=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
	printf '%-16s CRASH\n' "$target"
	# Not the stack, which is in the log.
	grep -A 2 -m 1 -e ' panicked at ' -e '^==.*ERROR' "$log" | cut -c 1-2000 || tail -n 20 "$log"
	if [[ -n $artifact ]]; then
		echo "  input:     $PWD/$artifact"
		echo "  reproduce: PCACHE_FUZZ_TRACE=1 $PWD/target/$HOST/release/$target $PWD/$artifact"
		echo "  debug:     cp $PWD/$artifact $PWD/corpus/$target/ && cargo test --features sim --test corpus"
	fi
	echo "  log:       $PWD/$log"
	return 1
}

fuzz_all() {
	local mode=$1 target failed=0
	shift
	for target in "$@"; do
		fuzz "$mode" "$target" || failed=1
	done
	return $failed
}

# The few inputs that reach most of what was reached. Inputs with a name that somebody gave them stay.
merge() {
	local target=$1 merged=target/merged/$1
	rm -rf "$merged"
	mkdir -p "$merged" "$FOUND/$target"
	run "$target" -set_cover_merge=1 -use_counters=0 "$merged" "corpus/$target" "$FOUND/$target"
	find "corpus/$target" -type f -regextype egrep -regex '.*/[0-9a-f]{40}' -delete
	# Those that are longest reach most; the corpus is to stay small.
	find "$merged" -type f -printf '%s %p\n' | sort -rn | head -n $MERGED_MAX | cut -d ' ' -f 2 |
		xargs -r cp -t "corpus/$target/"
	printf '%-16s %s inputs, %s\n' "$target" "$(find "corpus/$target" -type f | wc -l)" \
		"$(du -sh --apparent-size "corpus/$target" | cut -f 1)"
}

mode=${1:-}
shift || true
targets=("$@")
if ((${#targets[@]} == 0)); then
	targets=("${ALL[@]}")
fi
for target in "${targets[@]}"; do
	if [[ -z ${LEN_MAX[$target]:-} ]]; then
		echo "run.sh: there is no target $target: ${ALL[*]}" >&2
		exit 2
	fi
done
case $mode in
build) build ;;
smoke | fuzz)
	build
	fuzz_all "$mode" "${targets[@]}"
	;;
merge)
	build
	for target in "${targets[@]}"; do
		merge "$target"
	done
	;;
*)
	sed -n '2,/^$/s/^# \{0,1\}//p' "${0##*/}" >&2
	exit 2
	;;
esac
