# SPDX-License-Identifier: BSD-3-Clause
"""What the base holds after a drain and after a delete."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import AckClient, Host, IscsiTarget, RpcError, wait_until
from harness.ackclient import EXIT_DISCONNECTED, EXIT_DONE, EXIT_TARGET_ERROR
from harness.scenario import (
    BASE,
    CACHE,
    QUICK_US,
    SLOW,
    Storage,
    assert_intact,
    bdev_info,
    cache_info,
    cache_state,
    drain,
    error_of,
    set_latency,
    start_session,
    wait_online,
)


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


def test_a_cache_that_is_being_opened_is_not_drained(host: Host, media: Path, seed: int, meanwhile):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [*storage.slow_base(), storage.cache(SLOW)])
    assert_intact(client.write(session.url, seconds=0.5))
    drain(session.rpc)
    assert_intact(client.write(session.url, seconds=0.5))
    session.app.stop()
    app = host.start("spdk_tgt", bdevs=storage.slow_base())
    # What was written back last is read and compared.
    set_latency(app.rpc, "read", 1_000_000)
    created = meanwhile(app, "bdev_pcache_create", **storage.cache_params(SLOW))
    wait_until(lambda: cache_state(app.rpc) in ("opening", "recovering"), "the cache is being opened")
    error = error_of(app.rpc.bdev_pcache_delete, name=CACHE, drain=True)
    assert error.code == -16
    assert "being opened" in error.message
    assert created.result() == CACHE
    set_latency(app.rpc, "read", QUICK_US)
    assert_intact(client.verify(IscsiTarget(app, CACHE).url))
    assert app.rpc.bdev_pcache_delete(name=CACHE, drain=True) is True
    assert_intact(client.verify_file(storage.base_file))
    app.stop()


def test_a_cache_that_is_closed_without_a_drain_is_not_drained(host: Host, media: Path, seed: int, meanwhile):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [*storage.slow_base(), storage.cache(SLOW)])
    assert_intact(client.write(session.url, seconds=0.5))
    set_latency(session.rpc, "write", 1_000_000)
    session.rpc.bdev_pcache_set_options(name=CACHE, idle_writeback_ms=1)
    wait_until(lambda: cache_info(session.rpc)["base_operations"] > 0, "the base is being written to")
    deleted = meanwhile(session.app, "bdev_pcache_delete", name=CACHE)
    wait_until(lambda: cache_state(session.rpc) == "removing", "the cache is being closed")
    error = error_of(session.rpc.bdev_pcache_delete, name=CACHE, drain=True)
    assert error.code == -16
    # Nobody would write anything more.
    assert error_of(session.rpc.bdev_pcache_flush_start, name=CACHE).code == -16
    assert deleted.result() is True
    set_latency(session.rpc, "write", QUICK_US)
    session.rpc.bdev_pcache_create(**storage.cache_params(SLOW))
    assert session.rpc.bdev_pcache_delete(name=CACHE, drain=True) is True
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_base_removed_at_the_end_of_a_drain(host: Host, media: Path, seed: int, meanwhile, ended_client):
    """What was written after the drain was asked for is dirty still."""
    storage = Storage(media)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, [*storage.slow_base(), storage.cache(SLOW)], cores=2)
    set_latency(session.rpc, "write", 100_000)
    client.start_writing(session.url, seconds=60)
    time.sleep(0.5)
    deleted = meanwhile(session.app, "bdev_pcache_delete", name=CACHE, drain=True)
    wait_until(lambda: cache_state(session.rpc) == "removing", "the drain is over", timeout_s=60)
    session.rpc.bdev_delay_delete(name=SLOW)
    with pytest.raises(RpcError) as error:
        deleted.result()
    assert error.value.code == -19
    assert client.finish_writing().exit_code in (EXIT_DONE, EXIT_TARGET_ERROR, EXIT_DISCONNECTED)
    assert cache_state(session.rpc) == "pending"
    for call in storage.slow_base()[1:]:
        session.rpc.call(call["method"], call.get("params"))
    wait_online(session.rpc)
    target = IscsiTarget(session.app, CACHE, number=2)
    assert_intact(client.verify(target.url))
    assert session.rpc.bdev_pcache_delete(name=CACHE, drain=True) is True
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()
