# SPDX-License-Identifier: BSD-3-Clause
"""What textbook cache policies make of the same requests, by the simulator of libcachesim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libcachesim
from blocktrace import PAGE_SIZE, Trace

# log2 of the buckets of a simulator's hash table; it grows by itself.
_HASH_POWER = 20
POLICIES: dict[str, Callable[..., Any]] = {
    "lru": libcachesim.LRU,
    "fifo": libcachesim.FIFO,
    "arc": libcachesim.ARC,
    "s3fifo": libcachesim.S3FIFO,
}


@dataclass(frozen=True)
class Simulated:
    """Pages are what is cached, each as a whole."""

    hit_ratio: float
    base_read_bytes: int


def simulate(policy: str, trace: Trace, cache_mib: int) -> Simulated:
    """A cache of so many MiB of pages, without a byte for anything else.

    Reads and writes put the pages that they touch into the cache and count as uses of them; the hit ratio is
    that of the reads. A page of which only a part was read or written is cached as a whole all the same.
    """
    cache = POLICIES[policy]((cache_mib << 20) // PAGE_SIZE, hashpower=_HASH_POWER)
    access = libcachesim.Request()
    hits = 0
    for request in trace.requests:
        reads = request.kind == "read"
        for page in request.pages:
            access.obj_id = page
            hit = cache.get(access)
            hits += hit and reads
    missed_pages = trace.read_pages - hits
    return Simulated(hits / trace.read_pages, missed_pages * PAGE_SIZE)
