# SPDX-License-Identifier: BSD-3-Clause
"""Reads that are compared with checksums: the option, and bits that flip in the cache device."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from harness import Host, RpcError
from harness.scenario import (
    CACHE,
    MIB,
    Storage,
    assert_intact,
    cache_everything,
    cache_info,
    cache_stats,
    start_session,
    wait_online,
)

INVALID_PARAMS = -32602


def test_verified_reads_need_checksums(host: Host, media: Path):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=[storage.aio_base(), storage.cache()])
    wait_online(app.rpc, CACHE)
    with pytest.raises(RpcError) as caught:
        app.rpc.bdev_pcache_set_options(name=CACHE, verify_reads=True)
    assert caught.value.code == INVALID_PARAMS
    assert "verify_reads" in caught.value.message
    assert "data_crc" in caught.value.message
    info = cache_info(app.rpc)
    assert info is not None
    assert info["verify_reads"] is False
    app.rpc.bdev_pcache_set_options(name=CACHE, verify_reads=False)
    app.stop()


def flip_a_bit_of_each_segment(cache_file: Path) -> None:
    """In the payload that was stored first, which ends where the segment does."""
    with cache_file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as device:
        for end in range(2 * MIB, len(device) + 1, MIB):
            device[end - 100] ^= 4


def test_a_flipped_bit_of_clean_data_is_read_from_the_base(host: Host, media: Path, seed: int):
    options = {"segment_size_kib": 1024, "scrub_mib_s": 0, "data_crc": True}
    storage = Storage(media, base_mib=16, options=options)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    cache_everything(session, client)
    session.rpc.bdev_pcache_set_options(name=CACHE, verify_reads=True)
    flip_a_bit_of_each_segment(storage.cache_file)
    assert_intact(client.verify(session.url))
    stats = cache_stats(session.rpc)
    assert stats["verify.rd_bytes"] > 0
    assert stats["errors.cache_volume_crc"] > 0
    assert stats["errors.requests"] == 0
    session.app.stop()
