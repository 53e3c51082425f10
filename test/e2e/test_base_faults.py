# SPDX-License-Identifier: BSD-3-Clause
"""A sick or vanished base loses nothing."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import AckClient, Host, IscsiTarget, NvmfTarget, Rpc, RpcError, wait_until
from harness.ackclient import EXIT_DISCONNECTED, EXIT_DONE, EXIT_TARGET_ERROR
from harness.scenario import (
    BASE,
    CACHE,
    SICK,
    Storage,
    assert_intact,
    base_read_bytes,
    bdev_info,
    cache_info,
    cache_state,
    cache_stats,
    drain,
    drain_and_verify,
    heal,
    make_sick,
    start_session,
    wait_online,
)

PASSTHRU = "Between"


def health_told(rpc: Rpc) -> list[str]:
    """The notifications of the cache, but for those of SPDK itself."""
    told = [event["type"] for event in rpc.notify_get_notifications() if event["ctx"] == CACHE]
    return [kind for kind in told if kind.startswith("bdev_pcache")]


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
    wait_until(lambda: cache_state(session.rpc) == "online", "the trouble is over")
    assert health_told(session.rpc) == ["bdev_pcache_writeback_failing", "bdev_pcache_online"]
    assert_intact(client.verify(session.url))
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_base_that_fails_now_and_then_is_told_of_once(
    host: Host, media: Path, seed: int, ended_client: list[AckClient]
):
    storage = Storage(media)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, storage.sick_base())
    session.rpc.bdev_pcache_set_options(name=CACHE, dirty_low_percent=0, dirty_high_percent=1)
    client.start_writing(session.url, seconds=5)
    states = []
    until = time.monotonic() + 4
    while time.monotonic() < until:
        make_sick(session.rpc, "write", count=1)
        time.sleep(0.2)
        states.append(cache_state(session.rpc))
    assert_intact(client.finish_writing())
    heal(session.rpc)
    wait_until(lambda: cache_state(session.rpc) == "online", "the trouble is over")
    assert cache_stats(session.rpc)["errors.core_volume_wr"] > 3
    # Once it had come to that state it stayed there.
    assert states == sorted(states)
    assert health_told(session.rpc) == ["bdev_pcache_writeback_failing", "bdev_pcache_online"]
    assert session.app.log().count("write-back waits") == 1
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_reset_ends_a_read_that_hangs_on_the_base(host: Host, media: Path, seed: int):
    """SPDK's error bdev keeps what it is told to until it is reset."""
    storage = Storage(media)
    client = storage.client(seed)
    app = host.start("spdk_tgt", bdevs=storage.sick_base())
    wait_online(app.rpc)
    # In this order: the other one claims the bdev.
    resetter, target = IscsiTarget(app, CACHE), NvmfTarget(app, CACHE)
    assert_intact(client.write(target.url, seconds=1))
    app.rpc.bdev_error_inject_error(name=SICK, io_type="read", error_type="pending", num=4)
    asked_before = base_read_bytes(app.rpc)
    with ThreadPoolExecutor() as pool:
        # Most blocks were never written.
        verified = pool.submit(client.verify, target.url)
        wait_until(lambda: base_read_bytes(app.rpc) > asked_before, "the base is asked for something")
        resetter.reset_lun(1)
        # It took away the read that hung, and ended after it.
        assert verified.result().exit_code == EXIT_TARGET_ERROR
    assert "reads of the base do not end: it is reset" in app.log()
    heal(app.rpc)
    assert_intact(client.verify(target.url))
    drain_and_verify(app.rpc, client, storage)
    app.stop()


@pytest.mark.parametrize("claims", [True, False])
def test_base_without_write_zeroes_gets_them_as_data(host: Host, media: Path, seed: int, claims: bool):
    """SPDK's aio bdev claims WRITE ZEROES, which tmpfs always fails; or it does not, and SPDK writes."""
    storage = Storage(media)
    client = storage.client(seed)
    base = storage.aio_base()
    base["params"]["fallocate"] = claims
    session = start_session(host, [base, storage.cache()], target=NvmfTarget)
    assert_intact(client.write(session.url, writes=400, zero_percent=30, seconds=20))
    drain(session.rpc)
    stats = cache_stats(session.rpc)
    assert stats["requests.write_zeroes"] > 0
    assert stats["bytes.core_volume_zeroes"] > 0
    assert session.app.log().count("the base device fails WRITE_ZEROES") == claims
    assert_intact(client.verify(session.url))
    assert_intact(client.verify_file(storage.base_file))
    session.app.stop()


def test_base_that_fails_unmaps_gets_zeroes(host: Host, media: Path, seed: int):
    """SPDK's aio bdev claims UNMAP, which fails on what knows no discard, every time."""
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
    assert health_told(session.rpc) == []
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


@pytest.mark.parametrize(
    ("obstacle", "cache_mode"),
    [("sickness", "writeback"), ("sickness", "writethrough"), ("checkpoint", "writeback")],
)
def test_delete_gives_up_writes_that_wait(
    host: Host, media: Path, seed: int, ended_client, obstacle: str, cache_mode: str
):
    """A target lets go of a bdev only when all that was asked for has an answer."""
    storage = Storage(media, cache_mib=24)
    client = storage.client(seed)
    ended_client.append(client)
    bdevs = [*storage.sick_base()[:-1], storage.cache(SICK, cache_mode=cache_mode)]
    session = start_session(host, bdevs)
    if obstacle == "checkpoint":
        session.rpc.bdev_pcache_checkpoint_begin(name=CACHE, timeout_s=3600)
    else:
        make_sick(session.rpc, "write")
    client.start_writing(session.url, seconds=60, read_percent=0, unmap_percent=0)

    def stalled() -> bool:
        before = client.writes_acked()
        time.sleep(1)
        return client.writes_issued() > before == client.writes_acked()

    wait_until(stalled, "writes wait", timeout_s=30)
    assert session.rpc.bdev_pcache_delete(name=CACHE) is True
    assert client.finish_writing().exit_code in (EXIT_DONE, EXIT_TARGET_ERROR, EXIT_DISCONNECTED)
    heal(session.rpc)
    session.rpc.bdev_pcache_create(**storage.cache_params(SICK))
    assert_intact(client.verify(IscsiTarget(session.app, CACHE, number=2).url))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


@pytest.mark.slow
def test_delete_with_drain_over_a_sick_base_fails(host: Host, media: Path, seed: int, meanwhile):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base())
    make_sick(session.rpc, "write")
    assert_intact(client.write(session.url, writes=500, io_bytes="512:16384", seconds=20))
    deleted = meanwhile(session.app, "bdev_pcache_delete", name=CACHE, drain=True)
    wait_until(lambda: cache_info(session.rpc).get("reason"), "somebody who looks is told", timeout_s=20)
    info = cache_info(session.rpc)
    assert info["state"] == "draining"
    assert "write" in info["reason"]
    with pytest.raises(RpcError) as error:
        deleted.result()
    assert error.value.code == -5
    info = cache_info(session.rpc)
    assert info["state"] == "writeback_failing"
    # It has been so all the time.
    assert info["state_age_s"] >= 29
    assert_intact(client.verify(session.url))
    heal(session.rpc)
    assert session.rpc.bdev_pcache_delete(name=CACHE, drain=True) is True
    assert_intact(client.verify_file(storage.base_file))
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


def base_with_passthru(storage: Storage, **options: object) -> list[dict]:
    """A bdev between cache and base that can be pulled out."""
    return [storage.aio_base(), passthru(), storage.cache(PASSTHRU, **options)]


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
    assert info["dirty_bytes"] > 0
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


def test_options_that_were_changed_come_back_with_the_base(host: Host, media: Path, seed: int):
    """They are the cache's, whatever it was created with."""
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, base_with_passthru(storage, gc_percent=55))
    changed = {"writeback_order": "relaxed", "gc_percent": 33, "dirty_high_percent": 77}
    assert_intact(client.write(session.url, seconds=1))
    session.rpc.bdev_pcache_set_options(name=CACHE, **changed)
    pull_out_and_put_back(session.rpc)
    info = cache_info(session.rpc)
    assert info is not None
    assert {name: info[name] for name in changed} == changed
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


def test_base_that_is_named_by_an_alias_is_put_back(host: Host, media: Path):
    """SPDK gives a logical volume its alias when everybody has looked at it already."""
    storage = Storage(media)
    storage.client()
    volume = "Store0/Volume0"
    base = storage.aio_base()
    app = host.start("spdk_tgt", bdevs=[base])
    app.rpc.bdev_lvol_create_lvstore(bdev_name=BASE, lvs_name="Store0", clear_method="none")
    app.rpc.bdev_lvol_create(lvs_name="Store0", lvol_name="Volume0", size_in_mib=64)
    app.rpc.bdev_pcache_create(**storage.cache_params(volume))
    wait_online(app.rpc)
    app.rpc.bdev_aio_delete(name=BASE)
    wait_until(lambda: cache_state(app.rpc) == "pending", "the cache goes with its base")
    app.rpc.call(base["method"], base["params"])
    wait_online(app.rpc)
    assert health_told(app.rpc) == ["bdev_pcache_pending", "bdev_pcache_online"]
    app.stop()
