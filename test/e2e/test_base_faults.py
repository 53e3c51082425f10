# SPDX-License-Identifier: BSD-3-Clause
"""A sick or vanished base loses nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import AckClient, Host, IscsiTarget, NvmfTarget, Rpc, wait_until
from harness.ackclient import EXIT_DISCONNECTED, EXIT_DONE, EXIT_TARGET_ERROR
from harness.scenario import (
    BASE,
    CACHE,
    Storage,
    assert_intact,
    bdev_info,
    cache_info,
    cache_stats,
    drain,
    drain_and_verify,
    heal,
    make_sick,
    start_session,
    wait_online,
)

PASSTHRU = "Between"


@pytest.mark.parametrize("io_type", ["write", "flush"])
def test_failing_base_loses_nothing(host: Host, media: Path, seed: int, io_type: str):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base())
    make_sick(session.rpc, io_type)
    # Less than the cache holds, so that nobody has to wait for the base.
    assert_intact(client.write(session.url, writes=1500, io_bytes="512:16384", unmap_percent=0, seconds=20))
    session.rpc.bdev_pcache_flush_start(name=CACHE)

    def complaint() -> str | None:
        return session.rpc.bdev_pcache_flush_status(name=CACHE)["error"]

    assert wait_until(complaint, "the drain tells that the base fails", timeout_s=20)
    assert session.rpc.bdev_pcache_flush_status(name=CACHE)["in_progress"]
    info = cache_info(session.rpc)
    assert info["state"] == "writeback_failing"
    assert io_type in info["reason"]
    # Dirty data is read from the cache.
    assert_intact(client.verify(session.url))
    # It has been tried again meanwhile, and told once.
    assert cache_stats(session.rpc)["errors.core_volume_total"] > 1
    assert session.app.log().count("write-back waits") == 1
    heal(session.rpc)

    def drained() -> bool:
        return not session.rpc.bdev_pcache_flush_status(name=CACHE)["in_progress"]

    wait_until(drained, "the drain goes on by itself once the base is healthy", timeout_s=40)
    assert cache_info(session.rpc)["state"] == "online"
    told = [event["type"] for event in session.rpc.notify_get_notifications() if event["ctx"] == CACHE]
    assert [kind for kind in told if kind.startswith("bdev_pcache")] == [
        "bdev_pcache_writeback_failing",
        "bdev_pcache_online",
    ]
    assert_intact(client.verify(session.url))
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_base_that_fails_write_zeroes_gets_them_as_data(host: Host, media: Path, seed: int):
    """SPDK's aio bdev claims WRITE ZEROES, which fails on tmpfs, every time."""
    storage = Storage(media)
    client = storage.client(seed)
    bdevs = [storage.aio_base(), storage.cache()]
    session = start_session(host, bdevs, target=NvmfTarget)
    assert_intact(client.write(session.url, writes=400, zero_percent=30, seconds=20))
    assert cache_stats(session.rpc)["requests.write_zeroes"] > 0
    drain(session.rpc)
    assert_intact(client.verify(session.url))
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_base_that_fails_unmaps_gets_zeroes(host: Host, media: Path, seed: int):
    """SPDK's aio bdev claims UNMAP, which fails where the file system or device knows no discard, every time."""
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base())
    make_sick(session.rpc, "unmap")
    failures = []
    for _ in range(2):
        assert_intact(client.write(session.url, writes=400, unmap_percent=30, seconds=10))
        drain(session.rpc)
        failures.append(cache_stats(session.rpc)["errors.core_volume_wr"])
    assert cache_stats(session.rpc)["requests.unmaps"] > 0
    # It is asked once, and not again for a while. Nothing else is wrong with it.
    assert failures[0] == failures[1] > 0
    assert cache_info(session.rpc)["state"] == "online"
    told = [event["type"] for event in session.rpc.notify_get_notifications() if event["ctx"] == CACHE]
    assert "bdev_pcache_writeback_failing" not in told
    assert session.app.log().count("the base device fails UNMAP") == 1
    assert_intact(client.verify(session.url))
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_full_cache_waits_for_the_base(host: Host, media: Path, seed: int, ended_client):
    storage = Storage(media, cache_mib=24)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, storage.sick_base())
    make_sick(session.rpc, "write")
    client.start_writing(session.url, seconds=6, read_percent=0, unmap_percent=0)

    def stalled() -> bool:
        before = client.writes_acked()
        time.sleep(1)
        return before > 0 and client.writes_acked() == before

    wait_until(stalled, "the cache is full and writes wait", timeout_s=30)
    heal(session.rpc)
    # Those that waited are done, in the end, without an error.
    assert_intact(client.finish_writing())
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_killed_while_the_base_is_sick(host: Host, media: Path, seed: int, ended_client):
    storage = Storage(media)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, storage.sick_base())
    make_sick(session.rpc, "write")
    client.start_writing(session.url, seconds=20)
    time.sleep(1)
    session.app.kill()
    client.finish_writing()
    session = start_session(host, storage.sick_base())
    assert_intact(client.verify(session.url))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def base_with_passthru(storage: Storage) -> list[dict]:
    """A bdev between cache and base that can be pulled out."""
    return [storage.aio_base(), passthru(), storage.cache(PASSTHRU)]


def passthru() -> dict:
    return {
        "method": "bdev_passthru_create",
        "params": {"name": PASSTHRU, "base_bdev_name": BASE},
    }


def pull_out_and_put_back(rpc: Rpc) -> None:
    rpc.bdev_passthru_delete(name=PASSTHRU)
    wait_until(lambda: bdev_info(rpc, CACHE) is None, "the cache bdev goes with its base")
    info = cache_info(rpc)
    assert info is not None, "a cache with dirty data is not forgotten"
    assert info["state"] == "pending"
    rpc.call("bdev_passthru_create", passthru()["params"])
    wait_online(rpc, CACHE)
    assert cache_info(rpc)["state"] == "online"


def test_base_removed_with_dirty_data_and_put_back(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, base_with_passthru(storage))
    assert_intact(client.write(session.url, seconds=1))
    pull_out_and_put_back(session.rpc)
    target = IscsiTarget(session.app, CACHE, number=2)
    assert_intact(client.verify(target.url))
    assert_intact(client.write(target.url, seconds=1))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_base_removed_under_load(host: Host, media: Path, seed: int, ended_client: list[AckClient]):
    storage = Storage(media)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, base_with_passthru(storage), cores=2)
    client.start_writing(session.url, seconds=3)
    time.sleep(0.7)
    pull_out_and_put_back(session.rpc)
    result = client.finish_writing()
    assert result.exit_code in (EXIT_DONE, EXIT_TARGET_ERROR, EXIT_DISCONNECTED), result
    target = IscsiTarget(session.app, CACHE, number=2)
    assert_intact(client.verify(target.url))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_killed_while_the_base_is_away(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, base_with_passthru(storage))
    assert_intact(client.write(session.url, seconds=1))
    session.rpc.bdev_passthru_delete(name=PASSTHRU)
    session.app.kill()
    session = start_session(host, base_with_passthru(storage))
    assert_intact(client.verify(session.url))
    session.app.stop()
