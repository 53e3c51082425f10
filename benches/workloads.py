# SPDX-License-Identifier: BSD-3-Clause
"""The lines of the tables, and who takes part in each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """What bdevperf does. `io_size` in bytes."""

    name: str
    kind: str
    io_size: int
    depth: int
    peers: tuple[str, ...]
    read_percent: int = 0

    @property
    def writes(self) -> bool:
        """Does it write?"""
        return self.kind not in ("read", "randread")


_BASIC = ("malloc", "pcache", "ocf")
_DEPTH_1 = ("null", *_BASIC)
_DEPTH_32 = ("null", "passthru", *_BASIC, "pcache_crc", "malloc_2cores", "pcache_2cores")
_ZERO_COPY = ("malloc_zcopy", "pcache_zcopy")
_BUSY = ("pcache_busy", "pcache_busy_malloc")
_SKEWED = ("pcache_2cores_skewed", "pcache_2cores_zipf")

# Reads come first: they want everything in the cache, and writes go on in the log.
WORKLOADS = [
    Workload("randread_qd1", "randread", 4096, 1, _DEPTH_1),
    Workload("randread_qd32", "randread", 4096, 32, (*_DEPTH_32, *_ZERO_COPY)),
    Workload("randread_qd128", "randread", 4096, 128, _BASIC),
    Workload("seqread_128k_qd8", "read", 128 << 10, 8, _BASIC),
    Workload("randread_miss_qd32", "randread", 4096, 32, ("slow", "pcache_slow")),
    Workload("randwrite_qd1", "randwrite", 4096, 1, _DEPTH_1),
    Workload("randwrite_qd32", "randwrite", 4096, 32, (*_DEPTH_32, *_SKEWED, *_BUSY)),
    Workload("randwrite_qd128", "randwrite", 4096, 128, _BASIC),
    Workload("randwrite_512b_qd32", "randwrite", 512, 32, ("malloc_512", "pcache_512")),
    Workload("randrw_70_30_qd32", "randrw", 4096, 32, _BASIC, read_percent=70),
    Workload("seqwrite_128k_qd8", "write", 128 << 10, 8, (*_BASIC, "pcache_crc")),
]
