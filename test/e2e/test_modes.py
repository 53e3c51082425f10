# SPDX-License-Identifier: BSD-3-Clause
"""Cache modes with real applications: where acknowledged writes are, and changes while I/O goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from harness import Host, wait_until
from harness.scenario import (
    CACHE,
    Storage,
    assert_intact,
    cache_info,
    drain_and_verify,
    start_session,
)

MODES = ("writeback", "writethrough", "writearound", "writeonly", "passthrough")
ON_BASE = ("writethrough", "writearound", "passthrough")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_survives_a_kill(host: Host, media: Path, seed: int, mode: str):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache(cache_mode=mode)])
    assert_intact(client.write(session.url, writes=1500, io_bytes="512:65536", seconds=20))
    session.app.kill()
    if mode in ON_BASE:
        # Whatever was acknowledged is there without the cache.
        assert_intact(client.verify_file(storage.base_file))
    # The mode is remembered.
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))

    def reached() -> bool:
        info = cache_info(session.rpc)
        return info is not None and info["cache_mode"] == info["cache_mode_now"] == mode

    wait_until(reached, f"{mode} holds again", timeout_s=20)
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_modes_change_under_load(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    ended = threading.Event()
    failures: list[str] = []

    def change() -> None:
        number = 0
        while not ended.wait(0.2):
            mode = MODES[number % len(MODES)]
            number += 1
            try:
                session.rpc.bdev_pcache_set_options(name=CACHE, cache_mode=mode)
            except Exception as error:  # it is told by the test's own thread
                failures.append(f"{mode}: {error}")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        assert_intact(client.write(session.url, writes=4000, io_bytes="512:65536", seconds=20))
    finally:
        ended.set()
        changer.join()
    assert not failures
    assert_intact(client.verify(session.url))
    session.rpc.bdev_pcache_set_options(name=CACHE, cache_mode="passthrough")

    def reached() -> bool:
        info = cache_info(session.rpc)
        return info is not None and info["cache_mode_now"] == "passthrough"

    wait_until(reached, "the base has everything", timeout_s=40)
    assert_intact(client.verify_file(storage.base_file))
    assert_intact(client.verify(session.url))
    session.app.stop()
