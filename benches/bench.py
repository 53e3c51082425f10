#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""pcache beside its peers: real bdevperf, one machine, one run, the peers in turn in each round.

Settings are in the environment: BENCH_ROUNDS, BENCH_SECONDS of each workload, BENCH_ONLY (a regular
expression that is searched in "workload/peer"), BENCH_CACHE_GIB. docs/PERFORMANCE.md tells what the figures
mean. A figure is never a failure: the exit status is 1 only if something did not run.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test/e2e"))

import peers
import report
from harness import Host
from scenes import Bench


def _setting(name: str, default: int, least: int = 1) -> int:
    text = os.environ.get(name) or str(default)
    value = int(text) if text.isdecimal() else 0
    if value < least:
        raise SystemExit(f"bench: {name} must be a number, at least {least}, not {text}")
    return value


def main() -> int:
    """Runs it; returns the exit status."""
    rounds = _setting("BENCH_ROUNDS", 5)
    seconds = _setting("BENCH_SECONDS", 1)
    least_gib = peers.CACHE_MIB_LEAST >> 10
    wanted_mib = _setting("BENCH_CACHE_GIB", peers.CACHE_MIB_WANTED >> 10, least_gib) << 10
    only = re.compile(os.environ.get("BENCH_ONLY") or "")
    # What was reserved is given back then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with Host(app_mib=peers.APP_MIB, app_count=1) as host, peers.Store() as store:
        if host.spdk.app("bdevperf") is None:
            print("bench: this SPDK has no bdevperf; a built tree has one (SPDK_DIR)", file=sys.stderr)
            return 1
        cache_mib = store.cache_mib(wanted_mib)
        if cache_mib == 0:
            print("bench: too little memory is free", file=sys.stderr)
            return 1
        bench = Bench(host, store, cache_mib=cache_mib, seconds=seconds, only=only)
        machine = report.describe_machine(host)
        settings = {
            "rounds": rounds,
            "seconds": seconds,
            "brief_seconds": bench.brief_seconds,
            "only": only.pattern,
            "cache_mib": cache_mib,
            "working_set_mib": peers.WORKING_SET_MIB,
            "store": store.kind,
        }
        bench.say(f"{rounds} rounds of {seconds} s, a cache of {cache_mib} MiB on {store.kind}")
        if cache_mib < wanted_mib:
            bench.figures.notes["cache"] = (
                f"only {cache_mib} of {wanted_mib} MiB: write-back runs also where it should not"
            )
        for number in range(rounds):
            bench.say(f"round {number + 1} of {rounds}")
            bench.round(number)
        if not (bench.figures.samples or bench.figures.failed):
            bench.figures.failed["everything"] = "nothing was measured: does BENCH_ONLY match anything?"
        machine |= bench.machine
        print()
        print(report.markdown(bench.figures, machine, settings))
        for path in report.write(bench.figures, machine, settings):
            print(f"bench: {path}")
    for what, why in bench.figures.failed.items():
        print(f"bench: FAILED: {what}: {why}", file=sys.stderr)
    return 1 if bench.figures.failed else 0


if __name__ == "__main__":
    sys.exit(main())
