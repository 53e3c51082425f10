# SPDX-License-Identifier: BSD-3-Clause
"""A checkpoint holds the base at an exact cut of the cache, while I/O goes on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from harness import AckClient, Host, NvmfTarget, Rpc, wait_until
from harness.history import History
from harness.scenario import (
    BASE,
    CACHE,
    SICK,
    Session,
    Storage,
    assert_intact,
    cache_info,
    cache_stats,
    digest,
    drain,
    drain_and_verify,
    error_of,
    heal,
    make_sick,
    start_session,
)

# The largest write that reaches the cache in one piece over NVMe/TCP.
WRITES = {"io_bytes": "512:131072", "fua_percent": 3, "zero_percent": 4, "flush_percent": 3, "depth": 32}


def status(rpc: Rpc) -> dict[str, Any]:
    return rpc.bdev_pcache_checkpoint_status(name=CACHE)


def begin(rpc: Rpc, **params: Any) -> int:
    return rpc.bdev_pcache_checkpoint_begin(name=CACHE, **params)["checkpoint_id"]


def wait_for(rpc: Rpc, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
    def reached() -> dict[str, Any] | None:
        found = status(rpc)
        return found if found["state"] == state else None

    return wait_until(reached, f"the checkpoint is {state}", timeout_s)


@pytest.mark.parametrize("order", ["strict", "relaxed"])
def test_a_copy_of_the_base_during_a_hold_is_an_exact_cut(
    host: Host, media: Path, seed: int, ended_client: list[AckClient], order: str
):
    storage = Storage(media, base_mib=32, options={"segment_size_kib": 1024, "writeback_order": order})
    client = storage.client(seed)
    ended_client.append(client)
    history = History(media / "history")
    session = start_session(host, [storage.aio_base(), storage.cache()], target=NvmfTarget, cores=2)
    client.start_writing(session.url, seconds=60, history=history.path, **WRITES)
    wait_until(lambda: client.writes_acked() > 200, "some writes")
    for number in range(3):
        copy = media / "copy"
        since = history.now()
        checkpoint = begin(session.rpc, timeout_s=600)
        held = wait_for(session.rpc, "holding")
        until = history.now()
        acked, batches = client.writes_acked(), cache_stats(session.rpc)["writeback.batches"]
        shutil.copyfile(storage.base_file, copy)
        # I/O goes on meanwhile, as far as there is room for it.
        if number == 0:
            wait_until(lambda acked=acked: client.writes_acked() > acked, "writes go on")
        time.sleep(0.2)
        before_end = digest(storage.base_file)
        assert cache_stats(session.rpc)["writeback.batches"] == batches
        ended = session.rpc.bdev_pcache_checkpoint_end(name=CACHE, checkpoint_id=checkpoint)
        assert ended["seq"] == held["seq"]
        assert ended["checkpoint_id"] == checkpoint
        assert ended["held_ms"] >= 200
        assert before_end == digest(copy)
        complaints = history.complaints(copy, storage.block_size, since=since, until=until)
        assert not complaints, f"{len(complaints)} complaints: {complaints[:5]}"
        wait_until(
            lambda batches=batches: cache_stats(session.rpc)["writeback.batches"] > batches,
            "write-back goes on",
        )
    client.end()
    session.app.stop()


def test_the_judge_of_copies_knows_a_wrong_one(
    host: Host, media: Path, seed: int, ended_client: list[AckClient]
):
    """A copy without a checkpoint, made while write-back is at work, is no cut; and an old cut is too old."""
    storage = Storage(media, base_mib=32)
    client = storage.client(seed)
    ended_client.append(client)
    history = History(media / "history")
    session = start_session(host, [storage.aio_base(), storage.cache()], target=NvmfTarget)
    assert_intact(client.write(session.url, writes=2000, seconds=60, history=history.path, **WRITES))
    copy = media / "copy"
    shutil.copyfile(storage.base_file, copy)
    drain(session.rpc)
    now = history.now()
    assert not history.complaints(storage.base_file, storage.block_size, since=now, until=now)
    # Half of one moment, half of another.
    data, newer = copy.read_bytes(), storage.base_file.read_bytes()
    half = len(data) // 32
    copy.write_bytes(newer[:half] + data[half:])
    assert history.complaints(copy, storage.block_size, since=0, until=now)
    assert history.complaints(copy, storage.block_size, since=now, until=now)
    session.app.stop()


def held_session(host: Host, media: Path, seed: int, **params: Any) -> tuple[Storage, AckClient, Session]:
    """A base that is held, behind a cache with dirty data."""
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base())
    assert_intact(client.write(session.url, seconds=1))
    begin(session.rpc, **params)
    wait_for(session.rpc, "holding")
    assert_intact(client.write(session.url, writes=client.writes_issued() + 200, seconds=20))
    return storage, client, session


def test_one_checkpoint_at_a_time(host: Host, media: Path, seed: int):
    _, _, session = held_session(host, media, seed)
    found = status(session.rpc)
    assert found["timeout_s"] == 60
    assert found["percent"] == 100
    error = error_of(session.rpc.bdev_pcache_checkpoint_begin, name=CACHE)
    assert error.code == -16
    assert str(found["checkpoint_id"]) in error.message
    wrong = found["checkpoint_id"] + 1
    error = error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE, checkpoint_id=wrong)
    assert error.code == -2
    assert str(wrong) in error.message
    session.rpc.bdev_pcache_checkpoint_end(name=CACHE)
    assert status(session.rpc)["state"] == "idle"
    assert error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE).code == -2
    for timeout_s in (0, 3601):
        error = error_of(session.rpc.bdev_pcache_checkpoint_begin, name=CACHE, timeout_s=timeout_s)
        assert error.code == -32602
        assert f"timeout_s is {timeout_s}" in error.message
    session.app.stop()


def test_writers_wait_for_room_until_the_time_limit(
    host: Host, media: Path, seed: int, ended_client: list[AckClient]
):
    storage = Storage(media)
    client = storage.client(seed)
    ended_client.append(client)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    begin(session.rpc, timeout_s=8)
    wait_for(session.rpc, "holding")
    client.start_writing(session.url, seconds=20)

    def stands_still() -> bool:
        acked = client.writes_acked()
        time.sleep(0.3)
        return acked > 0 and acked == client.writes_acked()

    wait_until(stands_still, "the cache is full")
    assert status(session.rpc)["state"] == "holding"
    acked = client.writes_acked()
    found = wait_for(session.rpc, "expired")
    assert found["held_ms"] == 8000
    assert "time limit" in found["reason"]
    wait_until(lambda: client.writes_acked() > acked, "writers go on")
    error = error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE)
    assert error.code == -110
    assert "8 s" in error.message
    assert_intact(client.finish_writing())
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_drains_and_deletes_during_a_hold(host: Host, media: Path, seed: int):
    storage, client, session = held_session(host, media, seed, timeout_s=3600)
    held = digest(storage.base_file)
    session.rpc.bdev_pcache_flush_start(name=CACHE)
    time.sleep(0.3)
    flush = session.rpc.bdev_pcache_flush_status(name=CACHE)
    assert flush["in_progress"]
    assert "checkpoint" in flush["error"]
    error = error_of(session.rpc.bdev_pcache_delete, name=CACHE, drain=True)
    assert error.code == -16
    assert "checkpoint" in error.message
    assert digest(storage.base_file) == held
    session.rpc.bdev_pcache_checkpoint_end(name=CACHE)
    wait_until(
        lambda: not session.rpc.bdev_pcache_flush_status(name=CACHE)["in_progress"], "the flush goes on"
    )
    assert_intact(client.verify_file(storage.base_file))
    # Without a drain nothing is written to the base, so the cut stays; but nobody vouches for it any more.
    assert_intact(client.write(session.url, writes=client.writes_issued() + 200, seconds=20))
    begin(session.rpc)
    wait_for(session.rpc, "holding")
    assert_intact(client.write(session.url, writes=client.writes_issued() + 200, seconds=20))
    held = digest(storage.base_file)
    session.rpc.bdev_pcache_delete(name=CACHE)
    assert digest(storage.base_file) == held
    assert error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE).code == -19
    session.app.stop()
    session = start_session(host, storage.sick_base())
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_a_base_that_fails_delays_the_cut_and_can_be_given_up(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base())
    assert_intact(client.write(session.url, seconds=1))
    make_sick(session.rpc, "write")
    begin(session.rpc)
    wait_until(lambda: status(session.rpc)["reason"], "the status tells of the error")
    found = status(session.rpc)
    assert found["state"] == "writing_back"
    assert found["percent"] < 100
    error = error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE)
    assert error.code == -125
    begin(session.rpc)
    heal(session.rpc)
    wait_for(session.rpc, "holding")
    # What fails during a hold is no business of the checkpoint: nothing is written.
    make_sick(session.rpc, "write")
    assert_intact(client.write(session.url, writes=client.writes_issued() + 200, seconds=20))
    assert status(session.rpc)["state"] == "holding"
    session.rpc.bdev_pcache_checkpoint_end(name=CACHE)
    heal(session.rpc)
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_a_base_that_is_removed_ends_the_checkpoint(host: Host, media: Path, seed: int):
    storage, client, session = held_session(host, media, seed, timeout_s=3600)
    held = digest(storage.base_file)
    session.rpc.bdev_error_delete(name=SICK)
    wait_until(lambda: cache_info(session.rpc)["state"] == "pending", "the cache waits for its base")
    error = error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE)
    assert error.code == -6
    assert digest(storage.base_file) == held
    session.rpc.bdev_error_create(base_name=BASE)
    wait_until(lambda: cache_info(session.rpc)["state"] == "online", "the cache is back")
    assert status(session.rpc)["state"] == "idle"
    error = error_of(session.rpc.bdev_pcache_checkpoint_end, name=CACHE)
    assert error.code == -2
    assert "opened since" in error.message
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_killed_during_a_hold(host: Host, media: Path, seed: int):
    storage, client, session = held_session(host, media, seed, timeout_s=3600)
    held = digest(storage.base_file)
    session.app.kill()
    assert digest(storage.base_file) == held
    session = start_session(host, storage.sick_base())
    assert status(session.rpc)["state"] == "idle"
    assert_intact(client.verify(session.url))
    # An orderly end keeps the cut as well.
    begin(session.rpc, timeout_s=3600)
    wait_for(session.rpc, "holding")
    assert_intact(client.write(session.url, writes=client.writes_issued() + 200, seconds=20))
    held = digest(storage.base_file)
    session.app.stop()
    assert digest(storage.base_file) == held
    session = start_session(host, storage.sick_base())
    assert_intact(client.verify(session.url))
    session.app.stop()
