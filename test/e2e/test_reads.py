# SPDX-License-Identifier: BSD-3-Clause
"""Reads that the cache cannot answer alone."""

from __future__ import annotations

from pathlib import Path

from harness import Bdevperf, Host, Rpc
from harness.scenario import BASE, CACHE, MIB, Storage, cache_stats

SLOW = "Slow0"
LATENCY_US = 20_000
BLOCK_SIZE = 4096


def base_reads(rpc: Rpc) -> int:
    """How many reads the base has served."""
    (stats,) = rpc.bdev_get_iostat(name=BASE)["bdevs"]
    return stats["num_read_ops"]


def test_misses_of_the_same_blocks_share_base_reads(host: Host, need_app, media: Path):
    """Far more reads at once than there are blocks, over a base that takes its time."""
    need_app("bdevperf")
    storage = Storage(media, block_size=BLOCK_SIZE, base_mib=1, cache_mib=64)
    latencies = ("avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency")
    slow = {"base_bdev_name": BASE, "name": SLOW, **dict.fromkeys(latencies, LATENCY_US)}
    bdevs = [storage.malloc_base(), {"method": "bdev_delay_create", "params": slow}, storage.cache(SLOW)]
    bdevperf = Bdevperf(host, bdevs)
    before = base_reads(bdevperf.app.rpc)
    result = bdevperf.run("randread", io_size=BLOCK_SIZE, queue_depth=1024, seconds=1)
    assert result.io_failed == 0
    reads = base_reads(bdevperf.app.rpc) - before
    stats = cache_stats(bdevperf.app.rpc, CACHE)
    # Fills may be given up for a neighbour's sake, and read again. What was joined has not reached the base.
    assert 0 < reads * BLOCK_SIZE <= stats["bytes.core_volume_rd"], stats
    assert stats["misses.joined_bytes"] > stats["bytes.core_volume_rd"] // 4, stats
    bdevperf.stop()


def test_a_read_that_begins_in_a_page_caches_all_of_it(host: Host, need_app, media: Path):
    """Seven sectors after seven: nearly all begin in a page that the read before has touched."""
    need_app("bdevperf")
    sector, sectors = 512, 7
    storage = Storage(media, block_size=sector, base_mib=1, cache_mib=64)
    bdevperf = Bdevperf(host, [storage.malloc_base(), {"method": "bdev_wait_for_examine"}, storage.cache()])
    before = cache_stats(bdevperf.app.rpc, CACHE)
    base_before = base_reads(bdevperf.app.rpc)
    result = bdevperf.run("read", io_size=sectors * sector, queue_depth=1, seconds=1)
    assert result.io_failed == 0
    stats = {name: value - before[name] for name, value in cache_stats(bdevperf.app.rpc, CACHE).items()}
    # The first time through the device. Number k begins at sector 7k: of eight one begins with a page, one
    # lies in a page that is cached, six reach into the next. A few pages at both ends are known:
    # others have looked for partitions there.
    known = 16
    reads = MIB // (sectors * sector)
    assert abs(stats["requests.rd_full_misses"] - reads / 8) < known, stats
    assert abs(stats["requests.rd_partial_misses"] - reads * 6 / 8) < known, stats
    # Each page was read once, as a whole.
    pages, page = base_reads(bdevperf.app.rpc) - base_before, 4096
    assert MIB // page - known <= pages <= MIB // page, stats
    assert stats["bytes.core_volume_rd"] == stats["misses.fill_bytes"] == pages * page, stats
    bdevperf.stop()
