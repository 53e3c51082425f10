#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Replays a block trace through pcache, with SPDK and without, beside simulated cache policies.

Settings are in the environment: TRACE (a file with the columns version,time,op,size,lbn), CACHE_MIB, and
TRACE_PARTS (`spdk,engine`; what is left out is null in the end). docs/PERFORMANCE.md tells what the figures
mean. A figure is never a failure: the exit status is 1 only if something did not run, 2 if a setting or the
trace is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test/e2e"))

import native
from blocktrace import BadTrace, Trace, read_trace
from harness import AppFailed, Host, RpcConnectionLost, RpcError
from harness.memory import meminfo_mib
from harness.scenario import MIB
from policies import POLICIES, Simulated, simulate
from spdk_replay import replay_spdk

# What bdev_pcache_create accepts.
_CACHE_MIB_MIN, _CACHE_MIB_MAX = 8, 16 << 20
# Must stay free.
_SPARE_MIB = 2048
_FAILURES = (
    native.NativeFailed,
    AppFailed,
    RpcError,
    RpcConnectionLost,
    TimeoutError,
    subprocess.SubprocessError,
    OSError,
)


class BadSetting(Exception):
    """Says which, and what would be right."""


def _cache_mib() -> int:
    text = os.environ.get("CACHE_MIB", "")
    value = int(text) if text.isascii() and text.isdecimal() else 0
    if not _CACHE_MIB_MIN <= value <= _CACHE_MIB_MAX:
        raise BadSetting(
            f"CACHE_MIB is '{text}'; it must be a number of MiB from {_CACHE_MIB_MIN} to {_CACHE_MIB_MAX}"
        )
    return value


def _trace() -> Trace:
    text = os.environ.get("TRACE", "")
    if not text:
        raise BadSetting(
            "TRACE is missing; it must be the path of a trace: make bench-trace TRACE=... CACHE_MIB=..."
        )
    return read_trace(Path(text))


def _parts() -> set[str]:
    text = os.environ.get("TRACE_PARTS") or "spdk,engine"
    parts = set(text.split(","))
    if not parts <= {"spdk", "engine"}:
        raise BadSetting(f"TRACE_PARTS is '{text}'; it must be spdk, engine, or both with a comma")
    return parts


def _check_memory(trace: Trace, cache_mib: int) -> None:
    needed_mib = cache_mib + trace.footprint // MIB + _SPARE_MIB
    free_mib = meminfo_mib("MemAvailable")
    if needed_mib > free_mib:
        raise BadSetting(
            f"CACHE_MIB is {cache_mib}; with what the trace touches ({trace.footprint // MIB} MiB) and "
            f"{_SPARE_MIB} MiB to spare, memory of {needed_mib} MiB is needed, and {free_mib} MiB are free"
        )


def replay_engine(trace: Trace, commands: Path, folder: Path, cache_mib: int) -> dict[str, int]:
    """The counters of the engine alone (benches/trace.rs)."""
    cache = folder / "engine.pmem"
    command = [native.build("trace"), str(cache), str(cache_mib), str(trace.base_blocks), str(commands)]
    try:
        return native.run(command)["stats"]
    finally:
        cache.unlink(missing_ok=True)


def hit_ratio(stats: dict[str, int], trace: Trace) -> float:
    """Pages read that the cache served, over all of them."""
    if stats["read_pages"] != trace.read_pages:
        raise native.NativeFailed(
            f"pcache was asked for {stats['read_pages']} pages, and there are {trace.read_pages} in the trace"
        )
    return 1 - stats["read_missed_pages"] / stats["read_pages"]


def summary(
    trace: Trace, cache_mib: int, replayed: dict[str, dict[str, int]], simulated: dict[str, Simulated]
) -> dict[str, Any]:
    """The last line of the output."""
    line: dict[str, Any] = {"requests": len(trace.requests), "cache_mib": cache_mib}
    for part in ("spdk", "engine"):
        stats = replayed.get(part)
        line[f"hit_ratio_{part}"] = None if stats is None else round(hit_ratio(stats, trace), 6)
    line |= {policy: round(result.hit_ratio, 6) for policy, result in simulated.items()}
    stats = replayed.get("spdk", {})
    return line | {
        "base_read_bytes": stats.get("base_read_bytes"),
        "base_write_bytes": stats.get("writeback_bytes"),
    }


def table(trace: Trace, replayed: dict[str, dict[str, int]], simulated: dict[str, Simulated]) -> str:
    """The same for people."""
    names = {"spdk": "pcache, SPDK", "engine": "pcache, engine"}
    rows = [("", "hit ratio", "base reads, MiB", "base writes, MiB")]
    for part, stats in replayed.items():
        traffic = [f"{stats[counter] / MIB:.1f}" for counter in ("base_read_bytes", "writeback_bytes")]
        rows.append((names[part], f"{hit_ratio(stats, trace):.4f}", *traffic))
    for policy, result in simulated.items():
        rows.append(
            (f"{policy}, simulated", f"{result.hit_ratio:.4f}", f"{result.base_read_bytes / MIB:.1f}", "")
        )
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows)


def run() -> None:
    """Everything; what goes wrong is raised."""
    cache_mib, parts, trace = _cache_mib(), _parts(), _trace()
    _check_memory(trace, cache_mib)
    print(
        f"{len(trace.requests)} requests; they touch {trace.footprint / MIB:.1f} MiB, read "
        f"{trace.read_pages} pages and write {trace.write_bytes / MIB:.1f} MiB; a cache of {cache_mib} MiB",
        flush=True,
    )
    replayed = {}
    with tempfile.TemporaryDirectory(prefix="pcache-trace-", dir="/dev/shm") as name:
        folder = Path(name)
        commands = folder / "commands"
        trace.write_commands(commands)
        if "spdk" in parts:
            with Host(app_count=1) as host:
                replayed["spdk"] = replay_spdk(host, trace, commands, folder, cache_mib)
        if "engine" in parts:
            replayed["engine"] = replay_engine(trace, commands, folder, cache_mib)
    simulated = {policy: simulate(policy, trace, cache_mib) for policy in POLICIES}
    print(table(trace, replayed, simulated))
    print(json.dumps(summary(trace, cache_mib, replayed, simulated)))


def main() -> int:
    """Returns the exit status."""
    # What was made is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run()
    except (BadSetting, BadTrace) as error:
        print(f"bench-trace: {error}", file=sys.stderr)
        return 2
    except _FAILURES as error:
        print(f"bench-trace: FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
