# SPDX-License-Identifier: BSD-3-Clause
"""What a run leaves: results.json, results.md, plot.svg, and a table in the terminal."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plot
from figures import ABSOLUTES, RATIOS, Figures, Samples, Yardstick, medians, roofline, spreads
from harness import ROOT, Host
from harness.memory import meminfo_mib
from workloads import WORKLOADS

_OUT = ROOT / "target/bench"


def describe_machine(host: Host) -> dict[str, Any]:
    """Where and on what it was measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": any(" hypervisor" in line for line in cpuinfo),
        "memory_mib": meminfo_mib("MemTotal"),
        "kernel": platform.release(),
        "spdk": host.spdk.version,
        "spdk_memory": "hugepages" if host.hugepages.mount is not None else "4 KiB pages",
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "load_before": os.getloadavg()[0],
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@dataclass(frozen=True)
class Column:
    """How a metric is shown: its value is divided by `unit`."""

    metric: str
    head: str
    unit: float = 1.0
    digits: int = 2


_TABLES: list[tuple[str, str, Column]] = [
    ("rand", "4 KiB and 512 B", Column("iops", "M IOPS", 1e6, 3)),
    ("size_", "Amounts of cached data", Column("iops", "M IOPS", 1e6, 3)),
    ("seq", "128 KiB", Column("mibps", "GiB/s", 1024, 2)),
]
_LATENCIES = [
    Column("latency_us", "mean us"),
    Column("latency_us_median", "median us"),
    Column("latency_us_p9999", "p99.99 us"),
]
_UNITS = {
    "copy_128k_1_mibps": "MiB/s, 128 KiB, a fence after each",
    "copy_128k_8_mibps": "MiB/s, 128 KiB, a fence after eight",
    "copy_4k_1_mibps": "MiB/s, 4 KiB, a fence after each",
    "copy_4k_32_mibps": "MiB/s, 4 KiB, a fence after 32",
    "copy_4k_32_sequential_mibps": "MiB/s, 4 KiB in sequence, a fence after 32",
    "copy_4k_32_sequential_2cores_mibps": "MiB/s, 4 KiB in sequence, a fence after 32, on two cores at once",
    "load_4k_1g_mibps": "MiB/s, loads of 4 KiB from random places of 1 GiB",
    "load_4k_12g_mibps": "MiB/s, loads of 4 KiB from random places of 12 GiB",
    "mibps": "MiB/s",
    "writes_per_s": "writes in a second",
    "table_mib_per_gib": "MiB of the table for a GiB of cache",
    "bytes_per_page": "bytes of DRAM for each cached page",
    "instructions_per_io": "instructions for each request",
    "one_core_ns_per_key": "ns for each key, on one core",
    "two_cores_ns_per_key": "ns for each key, on two cores",
}
_OTHERS = ("copy", "index", "recovery", "recovery_engine", "backlog", "flushes", "instructions")
# Columns of a roofline.
_OF_ALL_PARTS = ("sum", "measured", "rest", "goal")
# While write-back and reclaim run, and while they do not.
_TAILS = ("malloc", "pcache", "pcache_busy", "pcache_busy_malloc")


def write(figures: Figures, machine: dict[str, Any], settings: dict[str, Any]) -> list[Path]:
    """Writes the files; returns where they are."""
    _OUT.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "settings": settings,
        "ratios": medians(figures, RATIOS),
        "absolutes": medians(figures, ABSOLUTES),
        "spreads": spreads(figures, [*RATIOS, *ABSOLUTES]),
        "roofline": roofline(figures),
        "figures": figures.summary(),
        "notes": figures.notes | _remarks(figures),
        "failed": figures.failed,
    }
    subtitle = _machine_line(machine)
    contents = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "results.md": markdown(figures, machine, settings),
        "plot.svg": plot.draw("pcache beside its peers (bdevperf)", subtitle, _panels(figures), _DRAWN),
    }
    for name, text in contents.items():
        (_OUT / name).write_text(text)
    return [_OUT / name for name in contents]


def _machine_line(machine: dict[str, Any]) -> str:
    stores = f"stores by {machine['store_kernel']}, " if "store_kernel" in machine else ""
    kind = "virtual machine" if machine["virtual"] else "machine"
    return (
        f"{machine['date'][:10]}, {kind} with {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_mib'] / 1024:.0f} GiB, Linux {machine['kernel']}, SPDK {machine['spdk']}, "
        f"{stores}commit {machine['commit'][:12]}"
        f"{' with changes' if machine['changed'] else ''}"
    )


# ---- tables -----------------------------------------------------------------------------------


def markdown(figures: Figures, machine: dict[str, Any], settings: dict[str, Any]) -> str:
    """All tables, to be pasted into docs/PERFORMANCE.md."""
    lines = [f"{_machine_line(machine)}.", ""]
    lines += [
        f"Median of {settings['rounds']} rounds of {settings['seconds']} s, writes with room "
        f"{settings['brief_seconds']:.2f} s, in brackets the least and the "
        f"greatest; a cache of {settings['cache_mib']} MiB on {settings['store']}; "
        f"load before the run {machine['load_before']:.1f}.",
        "",
        *_goal_table(figures, "Ratios", RATIOS),
        *_goal_table(figures, "Other figures with goals", ABSOLUTES),
    ]
    for prefix, title, column in _TABLES:
        lines += _workload_table(figures, prefix, title, column)
    lines += _tail_table(figures)
    lines += _roofline_table(figures)
    lines += _other_table(figures)
    for what, why in (figures.notes | _remarks(figures) | figures.failed).items():
        lines.append(f"- {what}: {why.splitlines()[0]}")
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) for width in widths)
    return [f"**{title}**", "", line(head), f"|{rule}|", *(line(row) for row in rows), ""]


def _goal_table(figures: Figures, title: str, yardsticks: list[Yardstick]) -> list[str]:
    values, ranges = medians(figures, yardsticks), spreads(figures, yardsticks)
    rows = []
    for yardstick in yardsticks:
        if yardstick.name in values:
            value, (low, high) = values[yardstick.name], ranges[yardstick.name]
            met = {True: "yes", False: "no", None: ""}[yardstick.is_met(value)]
            rows.append([yardstick.name, f"{value:.2f} ({low:.2f} to {high:.2f})", yardstick.goal(), met])
    return _table(title, ["figure", "value", "goal", "met"], rows)


def _cell(samples: Samples, column: Column, median: float | None) -> str:
    if median is None:
        return ""
    value, low, high = (
        f"{number / column.unit:.{column.digits}f}" for number in (median, min(samples), max(samples))
    )
    return value if len(samples) == 1 else f"{value} ({low} to {high})"


def _in_order(figures: Figures) -> list[str]:
    """The workloads that were measured: those of the list in its order, then those of scenes."""
    listed = [workload.name for workload in WORKLOADS if workload.name in figures.samples]
    return listed + [name for name in figures.samples if name not in listed]


def _workload_table(figures: Figures, prefix: str, title: str, column: Column) -> list[str]:
    """One row for each workload and peer."""
    rows = []
    for workload in _in_order(figures):
        if workload.startswith(prefix):
            for peer in figures.samples[workload]:
                median = figures.median(workload, peer, column.metric)
                cells = [_cell(figures.get(workload, peer, column.metric), column, median)]
                for latency in _LATENCIES:
                    of_peer = figures.median(workload, peer, latency.metric)
                    cells.append("" if of_peer is None else f"{of_peer:.{latency.digits}f}")
                rows.append([workload, peer, *cells])
    heads = [column.head, *(latency.head for latency in _LATENCIES)]
    return _table(title, ["workload", "peer", *heads], rows)


def _tail_table(figures: Figures) -> list[str]:
    """How the latency of random writes is distributed."""
    # No maximum: those of workloads that do not last equally long are not to be compared.
    metrics = ["latency_us_median", "latency_us_p99", "latency_us_p999", "latency_us_p9999"]
    rows = []
    for peer in _TAILS:
        medians_us = [figures.median("randwrite_qd32", peer, metric) for metric in metrics]
        if medians_us[0] is not None:
            rows.append([peer, *("" if value is None else f"{value:.1f}" for value in medians_us)])
    head = ["peer", "p50 us", "p99 us", "p99.9 us", "p99.99 us"]
    return _table("Latency of randwrite_qd32", head, rows)


def _roofline_table(figures: Figures) -> list[str]:
    """What the parts of a write cost."""
    roofs = roofline(figures)
    # Each once, in the order in which they come; what there is of all of them, last.
    parts = list(dict.fromkeys(part for ns in roofs.values() for part in ns if part not in _OF_ALL_PARTS))
    columns = [*parts, *_OF_ALL_PARTS]
    rows = [
        [name, *(f"{ns[column]:.0f}" if column in ns else "" for column in columns)]
        for name, ns in roofs.items()
    ]
    return _table("A durable write and its parts, in ns of a core", ["write", *columns], rows)


def _other_table(figures: Figures) -> list[str]:
    rows = []
    for workload in _OTHERS:
        for peer, metrics in figures.samples.get(workload, {}).items():
            for metric, samples in metrics.items():
                column = Column(metric, "")
                cell = _cell(samples, column, figures.median(workload, peer, metric))
                rows.append([workload, peer, _UNITS.get(metric, metric), cell])
    return _table("Without a peer", ["what", "of", "unit", "value"], rows)


def _remarks(figures: Figures) -> dict[str, str]:
    """Where reads were no hits, or write-back ran, although it should not be so."""
    remarks = {}
    for workload, peers in figures.samples.items():
        for peer in peers:
            hits = figures.median(workload, peer, "hit_share")
            if hits is not None and hits < 0.99 and "miss" not in workload and "busy" not in peer:
                remarks[f"{workload}/{peer}"] = f"only {hits:.0%} of the reads were hits"
            written = figures.median(workload, peer, "writeback_share")
            if written is not None and written > 0.01 and "size" not in workload and "busy" not in peer:
                remarks[f"{workload}/{peer}"] = f"write-back ran, {written:.0%} as fast as writes came"
    return remarks


# ---- the picture ------------------------------------------------------------------------------


def _panels(figures: Figures) -> list[plot.Panel]:
    wanted = [
        ("4 KiB random I/O, one core and two", "million IOPS", "iops", 1e6, ("randread_qd", "randwrite_qd")),
        ("128 KiB sequential, and the 70/30 mix at 4 KiB", "GiB/s", "mibps", 1024, ("seq", "randrw")),
        ("p99.99 latency", "microseconds", "latency_us_p9999", 1, ("randread_qd32", "randwrite_qd32")),
    ]
    panels = []
    for title, unit, metric, scale, prefixes in wanted:
        groups = [
            plot.Group(workload, _bars(figures, workload, metric, scale))
            for workload in _in_order(figures)
            if workload.startswith(prefixes)
        ]
        if any(group.bars for group in groups):
            panels.append(plot.Panel(title, unit, groups))
    return panels


# The null bdev's bar would dwarf the others.
_DRAWN = (
    "malloc",
    "ocf",
    "pcache",
    "pcache_crc",
    "malloc_zcopy",
    "pcache_zcopy",
    "malloc_2cores",
    "pcache_2cores",
    "pcache_busy",
    "pcache_busy_malloc",
)


def _bars(figures: Figures, workload: str, metric: str, scale: float) -> list[plot.Bar]:
    bars = []
    for peer in _DRAWN:
        median = figures.median(workload, peer, metric)
        if median is not None:
            samples = figures.get(workload, peer, metric)
            bars.append(plot.Bar(peer, median / scale, min(samples) / scale, max(samples) / scale))
    return bars
