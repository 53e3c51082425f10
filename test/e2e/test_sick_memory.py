# SPDX-License-Identifier: BSD-3-Clause
"""Memory of the cache device that is gone: the file behind the mapping is cut off, which raises SIGBUS."""

from __future__ import annotations

import os
from pathlib import Path

from harness import Host
from harness.scenario import (
    CACHE,
    MIB,
    Storage,
    assert_intact,
    cache_everything,
    cache_info,
    cache_stats,
    start_session,
)
from harness.util import wait_until

# The superblock and the tails lie before.
HEADER_BYTES = 2 * MIB


def test_lost_memory_is_an_error_and_not_the_end_of_the_process(host: Host, media: Path, seed: int):
    storage = Storage(media, base_mib=16, options={"segment_size_kib": 1024, "scrub_mib_s": 0})
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    cache_everything(session, client)
    os.truncate(storage.cache_file, HEADER_BYTES)

    # Everything is clean: the base has it.
    assert_intact(client.verify(session.url))
    assert cache_stats(session.rpc)["errors.cache_volume_rd"] > 0

    # The scrub finds the rest, and takes all segments out of service that are not being written.
    session.rpc.bdev_pcache_set_options(name=CACHE, scrub_mib_s=1024)

    def quarantined() -> bool:
        info = cache_info(session.rpc)
        return info is not None and info["segments_quarantined"] > 0

    wait_until(quarantined, "segments are taken out of service", timeout_s=20)

    assert session.rpc.spdk_get_version()
    session.app.stop()
