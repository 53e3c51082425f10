# SPDX-License-Identifier: BSD-3-Clause
"""SPDK has no requests left for operations on the base: they wait, and nobody hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Host
from harness.preload import build_preload, shortages
from harness.scenario import Storage, assert_intact, cache_stats, drain_and_verify, start_session

# Each thread has one of SPDK's requests for itself, without which it would wait for ever. The client has 64
# writes under way, which take all others, and reads 2 MiB at a time, which take half of them and leave too
# few for what is missing.
FEW = {"method": "bdev_set_options", "params": {"bdev_io_pool_size": 64, "bdev_io_cache_size": 1}}
DEPTH = 64
# Written back from the beginning, in many pieces.
OPTIONS = {"segment_size_kib": 1024, "dirty_low_percent": 0, "dirty_high_percent": 1}
SMALL_WRITES = {"io_bytes": "512:4096", "depth": DEPTH}


def test_what_finds_no_request_of_spdk_waits_for_one(host: Host, media: Path, tmp_path: Path, seed: int):
    storage = Storage(media, base_mib=32, options=OPTIONS)
    client = storage.client(seed)
    bdevs = [FEW, storage.aio_base(), storage.cache()]
    session = start_session(host, bdevs, before_module=build_preload("shortage", tmp_path))
    assert_intact(client.write(session.url, seconds=4, **SMALL_WRITES))
    assert_intact(client.verify(session.url))
    drain_and_verify(session.rpc, client, storage)
    assert shortages(session.app, "background") > 0
    assert shortages(session.app, "channels") > 0
    assert shortages(session.app, "refused") == 0
    stats = cache_stats(session.rpc)
    assert (stats["errors.core_volume_total"], stats["errors.requests"]) == (0, 0)
    session.app.stop()


def test_what_is_short_of_something_else_is_tried_again(
    host: Host, media: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PCACHE_SHORTAGE_EVERY", "5")
    storage = Storage(media, base_mib=32, options=OPTIONS)
    client = storage.client(seed)
    bdevs = [storage.aio_base(), storage.cache()]
    session = start_session(host, bdevs, before_module=build_preload("shortage", tmp_path))
    assert_intact(client.write(session.url, seconds=2, **SMALL_WRITES))
    assert_intact(client.verify(session.url))
    drain_and_verify(session.rpc, client, storage)
    assert shortages(session.app, "refused") >= 64
    assert shortages(session.app, "background") == 0
    stats = cache_stats(session.rpc)
    assert (stats["errors.core_volume_total"], stats["errors.requests"]) == (0, 0)
    session.app.stop()
