# SPDX-License-Identifier: BSD-3-Clause
"""What was measured: samples of each round, medians and spread, and the ratios that the goals speak of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# The value of one round.
Samples = list[float]
Get = Callable[[str, str, str], float]


@dataclass
class Figures:
    """Samples by workload, peer and metric; what was left out, and what went wrong."""

    samples: dict[str, dict[str, dict[str, Samples]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, workload: str, peer: str, **metrics: float) -> None:
        """What one round gave."""
        of_peer = self.samples.setdefault(workload, {}).setdefault(peer, {})
        for metric, value in metrics.items():
            of_peer.setdefault(metric, []).append(float(value))

    def get(self, workload: str, peer: str, metric: str) -> Samples:
        """All rounds; empty if it was not measured."""
        return self.samples.get(workload, {}).get(peer, {}).get(metric, [])

    def median(self, workload: str, peer: str, metric: str) -> float | None:
        """None if it was not measured."""
        samples = self.get(workload, peer, metric)
        return statistics.median(samples) if samples else None

    def summary(self) -> dict[str, Any]:
        """Everything, for results.json."""
        return {
            workload: {
                peer: {metric: _describe(samples) for metric, samples in metrics.items()}
                for peer, metrics in peers.items()
            }
            for workload, peers in self.samples.items()
        }


def _describe(samples: Samples) -> dict[str, Any]:
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": samples,
    }


@dataclass(frozen=True)
class Yardstick:
    """A ratio of two figures, `ours` / `theirs`, or ours alone. A goal is a limit: at least, or at most."""

    name: str
    ours: tuple[str, str, str]
    theirs: tuple[str, str, str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    # The cost, 1 - ours / theirs, in the place of the ratio.
    is_cost: bool = False

    def of(self, get: Get) -> float:
        """Its value, with the figures that `get` gives."""
        if self.theirs is None:
            return get(*self.ours)
        quotient = get(*self.ours) / get(*self.theirs)
        return 1 - quotient if self.is_cost else quotient

    def rounds(self, figures: Figures) -> int:
        """In how many its figures were measured."""
        ours = len(figures.get(*self.ours))
        return ours if self.theirs is None else min(ours, len(figures.get(*self.theirs)))

    def goal(self) -> str:
        """As text."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    def is_met(self, value: float) -> bool | None:
        """None if there is no goal."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


def _iops(name: str, workload: str, ours: str, theirs: str, **goal: Any) -> Yardstick:
    return Yardstick(name, (workload, ours, "iops"), (workload, theirs, "iops"), **goal)


_WRITE = "randwrite_qd32"
_BUSY = (_WRITE, "pcache_busy")
_SEQUENTIAL = ("seqwrite_128k_qd8", "pcache", "mibps")

RATIOS = [
    _iops("randwrite_qd32_vs_malloc", _WRITE, "pcache", "malloc", at_least=2),
    _iops("randwrite_qd32_vs_ocf", _WRITE, "pcache", "ocf", at_least=8),
    Yardstick(
        "randwrite_qd1_latency_vs_malloc",
        ("randwrite_qd1", "pcache", "latency_us"),
        ("randwrite_qd1", "malloc", "latency_us"),
        at_most=1,
    ),
    _iops("randread_qd32_vs_malloc", "randread_qd32", "pcache", "malloc", at_least=1),
    _iops("zcopy_randread_qd32_vs_malloc", "randread_qd32", "pcache_zcopy", "malloc", at_least=3),
    _iops("zcopy_malloc_vs_malloc", "randread_qd32", "malloc_zcopy", "malloc"),
    _iops("two_cores_vs_one_randwrite", _WRITE, "pcache_2cores", "pcache", at_least=1.9),
    _iops("two_cores_skewed_vs_uniform", _WRITE, "pcache_2cores_skewed", "pcache_2cores"),
    _iops("zipf", _WRITE, "pcache_2cores_zipf", "pcache_2cores"),
    Yardstick(
        "seqwrite_128k_vs_copy_limit",
        _SEQUENTIAL,
        ("copy", "limit", "copy_128k_8_mibps"),
        at_least=0.85,
    ),
    _iops("data_crc_cost", _WRITE, "pcache_crc", "pcache", at_most=0.15, is_cost=True),
    Yardstick("busy_vs_idle_randwrite", (*_BUSY, "iops"), (_WRITE, "pcache", "iops"), at_least=0.7),
    Yardstick(
        "busy_p9999_vs_median",
        (*_BUSY, "latency_us_p9999"),
        (*_BUSY, "latency_us_median"),
        at_most=20,
    ),
    Yardstick(
        "busy_over_malloc_p9999_vs_median",
        (_WRITE, "pcache_busy_malloc", "latency_us_p9999"),
        (_WRITE, "pcache_busy_malloc", "latency_us_median"),
    ),
    _iops("size_4g_vs_1g_randwrite", "size_randwrite_qd32", "4g", "1g", at_least=0.9),
    _iops("size_12g_vs_1g_randwrite", "size_randwrite_qd32", "12g", "1g", at_least=0.9),
    _iops("size_4g_vs_1g_randread", "size_randread_qd32", "4g", "1g", at_least=0.9),
    _iops("size_12g_vs_1g_randread", "size_randread_qd32", "12g", "1g", at_least=0.9),
    Yardstick(
        "load_limit_12g_vs_1g",
        ("copy", "limit", "load_4k_12g_mibps"),
        ("copy", "limit", "load_4k_1g_mibps"),
    ),
    Yardstick(
        "backlog_writeback_vs_malloc",
        ("backlog", "pcache", "mibps"),
        ("backlog", "malloc", "mibps"),
        at_least=0.9,
    ),
    Yardstick(
        "backlog_direct_writeback_vs_malloc",
        ("backlog", "pcache_direct", "mibps"),
        ("backlog", "malloc", "mibps"),
        at_least=0.9,
    ),
    Yardstick(
        "backlog_writeback_vs_malloc_cached",
        ("backlog", "pcache", "mibps"),
        ("backlog", "malloc_cached", "mibps"),
    ),
    Yardstick(
        "backlog_writeback_vs_malloc_128k",
        ("backlog", "pcache", "mibps"),
        ("seqwrite_128k_qd8", "malloc", "mibps"),
    ),
    Yardstick(
        "backlog_limited_writeback_vs_base",
        ("backlog", "pcache_limited", "mibps"),
        ("backlog", "limited_base", "mibps"),
        at_least=0.9,
    ),
    Yardstick(
        "flushes_strict_vs_base",
        ("flushes", "pcache_strict", "writes_per_s"),
        ("flushes", "aio", "writes_per_s"),
    ),
    Yardstick(
        "flushes_relaxed_vs_base",
        ("flushes", "pcache_relaxed", "writes_per_s"),
        ("flushes", "aio", "writes_per_s"),
    ),
    _iops("randread_miss_vs_base", "randread_miss_qd32", "pcache_slow", "slow"),
    _iops("randwrite_512b_vs_malloc", "randwrite_512b_qd32", "pcache_512", "malloc_512"),
    _iops("randwrite_over_malloc_busy_vs_malloc", _WRITE, "pcache_busy_malloc", "malloc"),
    _iops("two_cores_randread_vs_malloc", "randread_qd32", "pcache_2cores", "malloc_2cores"),
    Yardstick(
        "seqread_128k_vs_malloc",
        ("seqread_128k_qd8", "pcache", "mibps"),
        ("seqread_128k_qd8", "malloc", "mibps"),
    ),
    _iops("two_cores_vs_one_randwrite_malloc", _WRITE, "malloc_2cores", "malloc"),
]


ABSOLUTES = [
    Yardstick("index_dense_mib_per_gib", ("index", "dense", "table_mib_per_gib"), at_most=3),
    Yardstick("index_scattered_bytes_per_page", ("index", "scattered", "bytes_per_page"), at_most=32),
    Yardstick(
        "index_scattered_512b_bytes_per_page", ("index", "scattered_512", "bytes_per_page"), at_most=32
    ),
    Yardstick("recovery_million_keys_per_s", ("recovery", "1core", "million_keys_per_s"), at_least=10),
    Yardstick("recovery_million_keys_per_s_two_cores", ("recovery", "2cores", "million_keys_per_s")),
    Yardstick(
        "recovery_million_keys_per_s_per_core",
        ("recovery", "2cores", "million_keys_per_s_per_core"),
        at_least=10,
    ),
    Yardstick("recovery_ns_per_4k_key", ("recovery_engine", "2m_4k", "one_core_ns_per_key"), at_most=100),
    Yardstick(
        "recovery_ns_per_key_4m_vs_1m",
        ("recovery_engine", "4m", "one_core_ns_per_key"),
        ("recovery_engine", "1m", "one_core_ns_per_key"),
    ),
    Yardstick(
        "recovery_ns_per_key_12m_vs_1m",
        ("recovery_engine", "12m", "one_core_ns_per_key"),
        ("recovery_engine", "1m", "one_core_ns_per_key"),
    ),
    Yardstick("instructions_per_write_qd1", ("randwrite_qd1", "pcache", "instructions_per_io"), at_most=1000),
    Yardstick(
        "instructions_per_write_qd1_engine_alone", ("instructions", "engine_write_qd1", "instructions_per_io")
    ),
    Yardstick(
        "instructions_per_read_qd1_engine_alone", ("instructions", "engine_read_qd1", "instructions_per_io")
    ),
]


def roofline(figures: Figures) -> dict[str, dict[str, float]]:
    """What the parts of a durable write cost in nanoseconds of a core, each alone; their sum, all of a write,
    and what that might cost for the goal. Only where everything was measured."""
    found = {}
    for name, (parts, measured, goal) in _rooflines(figures).items():
        known = {part: value for part, value in parts.items() if value is not None}
        if len(known) == len(parts) and measured is not None:
            parts_ns = sum(known.values())
            whole = {"sum": parts_ns, "measured": measured, "rest": measured - parts_ns}
            found[name] = known | whole | ({} if goal is None else {"goal": goal})
    return found


Parts = dict[str, float | None]


def _rooflines(figures: Figures) -> dict[str, tuple[Parts, float | None, float | None]]:
    """Parts, all of it, and the goal."""

    def ns(workload: str, peer: str, cores: int = 1) -> float | None:
        iops = figures.median(workload, peer, "iops")
        return cores * 1e9 / iops if iops else None

    def times(factor: float, value: float | None) -> float | None:
        return None if value is None else factor * value

    def copy_ns(metric: str, size_bytes: int, cores: int = 1) -> float | None:
        mibps = figures.median("copy", "limit", metric)
        return cores * size_bytes / mibps / 2**20 * 1e9 if mibps else None

    def cost(of: str, part: str) -> float | None:
        return figures.median("costs", of, part)

    def own(depth: str) -> Parts:
        return {part: cost(depth, part) for part in ("copy_and_fence", "index", "kset_and_fence")}

    empty, trip, one = (ns(_WRITE, peer) for peer in ("null", "passthru", "pcache"))
    both, long = ns(_WRITE, "pcache_2cores", 2), ns("seqwrite_128k_qd8", "pcache")
    batch = {"bdev_layer": empty} | own("qd32")
    copy_of_both = {"copy_and_fence": copy_ns("copy_4k_32_sequential_2cores_mibps", 4096, 2)}
    background = {
        "base_write": None if trip is None or empty is None else trip - empty,
        "write_back_and_reclaim": cost("background", "write_back_and_reclaim"),
    }
    copy_long = copy_ns("copy_128k_8_mibps", 128 << 10)
    pages = {part: times(32, batch[part]) for part in ("index", "kset_and_fence")}
    return {
        "qd1": (
            {"bdev_layer": ns("randwrite_qd1", "null")} | own("qd1"),
            ns("randwrite_qd1", "pcache"),
            ns("randwrite_qd1", "malloc"),
        ),
        "qd32": (batch, one, times(1 / 2, ns(_WRITE, "malloc"))),
        "two cores": (batch | copy_of_both, both, times(2 / 1.9, one)),
        "busy": (batch | background, ns(_WRITE, "pcache_busy"), times(1 / 0.7, one)),
        "128k": (
            {"bdev_layer": empty, "copy_and_fence": copy_long} | pages,
            long,
            times(1 / 0.85, copy_long),
        ),
    }


def medians(figures: Figures, yardsticks: list[Yardstick]) -> dict[str, float]:
    """Of the rounds, since a machine may be slower in one than in another; those whose figures are there."""
    return {name: statistics.median(values) for name, values in _of_rounds(figures, yardsticks).items()}


def spreads(figures: Figures, yardsticks: list[Yardstick]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of the rounds."""
    return {name: (min(values), max(values)) for name, values in _of_rounds(figures, yardsticks).items()}


def _of_rounds(figures: Figures, yardsticks: list[Yardstick]) -> dict[str, list[float]]:
    """The value of each round; those whose figures are there."""
    found = {}
    for yardstick in yardsticks:
        values = [
            yardstick.of(lambda *of, number=number: figures.get(*of)[number])
            for number in range(yardstick.rounds(figures))
        ]
        if values:
            found[yardstick.name] = values
    return found
