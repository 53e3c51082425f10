# SPDX-License-Identifier: BSD-3-Clause
"""What the base holds after a drain and after a delete."""

from __future__ import annotations

import time
from pathlib import Path

from harness import AckClient, Host
from harness.scenario import BASE, CACHE, Storage, assert_intact, bdev_info, drain, start_session


def written_session(host: Host, storage: Storage, client: AckClient):
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.write(session.url, seconds=1))
    return session


def test_drained_base_is_identical(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = written_session(host, storage, client)
    status = drain(session.rpc)
    assert status["dirty_bytes_left"] == 0
    assert status["percent"] == 100
    assert status["error"] is None
    # The cache is still there; the base is compared without it.
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_drain_goes_on_under_writes(host: Host, media: Path, seed: int, ended_client):
    storage = Storage(media)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, [storage.aio_base(), storage.cache()], cores=2)
    client.start_writing(session.url, seconds=4)
    time.sleep(0.5)
    drain(session.rpc)
    assert_intact(client.finish_writing())
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_delete_with_drain_leaves_a_complete_base(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = written_session(host, storage, client)
    assert session.rpc.bdev_pcache_delete(name=CACHE, drain=True) is True
    assert bdev_info(session.rpc, CACHE) is None
    assert not bdev_info(session.rpc, BASE)["claimed"]
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_delete_without_drain_keeps_everything_in_the_cache(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = written_session(host, storage, client)
    assert session.rpc.bdev_pcache_delete(name=CACHE) is True
    assert bdev_info(session.rpc, CACHE) is None
    assert not bdev_info(session.rpc, BASE)["claimed"]
    session.app.stop()
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_created_again_in_the_same_process(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = written_session(host, storage, client)
    session.rpc.bdev_pcache_delete(name=CACHE)
    session.rpc.bdev_pcache_create(**storage.cache_params())
    session.rpc.bdev_pcache_delete(name=CACHE, drain=True)
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_end_of_the_application_keeps_everything(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = written_session(host, storage, client)
    session.app.stop()
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()
