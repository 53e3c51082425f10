# SPDX-License-Identifier: BSD-3-Clause
"""A base that changes its size: in use, or while the cache is away. SPDK lets no bdev shrink in use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import App, Host, IscsiTarget, RpcError, wait_until
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    Storage,
    assert_intact,
    bdev_info,
    drain_and_verify,
    make_used_cache,
    start_session,
    wait_online,
)


def take_half_away(storage: Storage) -> bytes:
    """Cuts the base file in the middle and returns what was behind."""
    whole = storage.base_file.read_bytes()
    os.truncate(storage.base_file, len(whole) // 2)
    return whole[len(whole) // 2 :]


def give_back(app: App, storage: Storage, rest: bytes) -> None:
    with storage.base_file.open("ab") as file:
        file.write(rest)
    app.rpc.bdev_aio_rescan(name=BASE)


def blocks(storage: Storage) -> int:
    return storage.base_mib * MIB // storage.block_size


def notifications(app: App) -> set[tuple[str, str]]:
    return {(event["type"], event["ctx"]) for event in app.rpc.notify_get_notifications()}


def test_cache_grows_with_its_base_and_remembers(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    rest = take_half_away(storage)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base(), storage.cache()])
    assert wait_online(app.rpc)["num_blocks"] == blocks(storage) // 2
    give_back(app, storage, rest)
    wait_until(
        lambda: bdev_info(app.rpc, CACHE)["num_blocks"] == blocks(storage),
        "the cache has the size of its base",
    )
    assert ("bdev_pcache_resized", CACHE) in notifications(app)
    # All of it is used, and survives a kill: the new size is on the cache device.
    target = IscsiTarget(app, CACHE)
    assert_intact(client.write(target.url, seconds=1))
    app.kill()
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


def test_base_that_grew_meanwhile_is_taken_on_demand_only(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    os.truncate(storage.base_file, 2 * storage.base_mib * MIB)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    with pytest.raises(RpcError) as caught:
        app.rpc.call("bdev_pcache_create", storage.cache_params())
    for part in (str(blocks(storage)), str(2 * blocks(storage)), "base_growth=accept"):
        assert part in caught.value.message
    app.rpc.call("bdev_pcache_create", storage.cache_params(base_growth="accept"))
    assert wait_online(app.rpc)["num_blocks"] == 2 * blocks(storage)
    target = IscsiTarget(app, CACHE)
    assert_intact(client.verify(target.url))
    app.stop()
    # From now on that is its size.
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_smaller_base_is_refused_even_if_growth_is_accepted(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    take_half_away(storage)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    with pytest.raises(RpcError) as caught:
        app.rpc.call("bdev_pcache_create", storage.cache_params(base_growth="accept"))
    assert str(blocks(storage) // 2) in caught.value.message
    assert "accept" not in caught.value.message
    app.stop()
