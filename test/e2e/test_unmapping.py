# SPDX-License-Identifier: BSD-3-Clause
"""Unmapping a large cache device takes long: neither reactors nor the base wait, and a delete can come."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from harness import AckClient, App, Hold, Host, IscsiTarget, RpcError, wait_until
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    SLOW,
    Storage,
    assert_intact,
    bdev_info,
    cache_state,
    drain,
    make_used_cache,
    set_latency,
    start_session,
    wait_online,
)

BETWEEN = "Between"
OTHER = "Other0"
# Both copies of the tails in the cache file (docs/FORMAT.md).
TAILS_OFFS = (8192, 40960)


def unmapping_threads(hold: Hold, app: App, storage: Storage) -> list[str]:
    """Who has unmapped the cache device, or has begun to."""
    return hold.threads(app, "munmap", storage.cache_mib * MIB)


def wait_unmapping(hold: Hold, app: App, storage: Storage) -> None:
    """Until somebody has begun to."""
    wait_until(lambda: unmapping_threads(hold, app, storage), "the cache device is unmapped")


def between(base: str) -> dict[str, Any]:
    """The base of the cache, over the right base or another one."""
    return {"method": "bdev_passthru_create", "params": {"name": BETWEEN, "base_bdev_name": base}}


def make_used_cache_between(host: Host, storage: Storage, client: AckClient) -> dict[str, Any]:
    """A cache that has seen writes; and another base, whose content tells that it is not the right one."""
    session = start_session(host, [storage.aio_base(), between(BASE), storage.cache(BETWEEN)])
    assert_intact(client.write(session.url, seconds=0.5))
    drain(session.rpc)
    session.app.stop()
    other_file = storage.folder / "other.img"
    with other_file.open("wb") as file:
        file.truncate(storage.base_mib * MIB)
    other = storage.aio_base(OTHER)
    other["params"]["filename"] = str(other_file)
    return other


def test_a_cache_that_is_refused_is_unmapped_by_another_thread(
    host: Host, media: Path, hold: Hold, meanwhile
):
    storage = Storage(media)
    make_used_cache(host, storage, storage.client(), drained=True)
    # What the superblock tells is known before anything is mapped; this is not.
    with storage.cache_file.open("r+b") as file:
        for off in TAILS_OFFS:
            file.seek(off)
            file.write(os.urandom(512))
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()], before_module=hold.library)
    hold.hold("munmap")
    created = meanwhile(app, "bdev_pcache_create", **storage.cache_params())
    wait_unmapping(hold, app, storage)
    assert cache_state(app.rpc) == "opening"
    hold.let_go("munmap")
    error = created.exception()
    assert isinstance(error, RpcError)
    assert error.code == -errno.EIO
    assert unmapping_threads(hold, app, storage) == ["pcache-map"]
    # Its answer came when that had ended: the device can be had.
    app.rpc.bdev_pcache_create(**storage.cache_params(format="force"))
    app.stop()


def test_a_cache_that_is_given_up_is_unmapped_by_another_thread(
    host: Host, media: Path, hold: Hold, meanwhile
):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=storage.slow_base(), before_module=hold.library)
    set_latency(app.rpc, "read", 1_000_000)
    hold.hold("munmap")
    created = meanwhile(app, "bdev_pcache_create", **storage.cache_params(SLOW))
    # What the base holds is noted in a new cache.
    wait_until(lambda: "stored to with" in app.log(), "the cache device is mapped")
    assert cache_state(app.rpc) == "opening"
    deleted = meanwhile(app, "bdev_pcache_delete", name=CACHE)
    wait_unmapping(hold, app, storage)
    assert not created.done()
    assert not deleted.done()
    hold.let_go("munmap")
    assert deleted.result() is True
    error = created.exception()
    assert isinstance(error, RpcError)
    assert error.code == -errno.ECANCELED
    assert not storage.cache_file.exists()
    assert unmapping_threads(hold, app, storage) == ["pcache-unmap"]
    app.stop()


def test_a_base_that_is_refused_does_not_wait(host: Host, media: Path, hold: Hold, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    other = make_used_cache_between(host, storage, client)
    bdevs = [storage.aio_base(), other, storage.cache(BETWEEN)]
    app = host.start("spdk_tgt", bdevs=bdevs, before_module=hold.library)
    hold.hold("munmap")
    app.rpc.call(**between(OTHER))
    wait_unmapping(hold, app, storage)
    # Its examination has ended, and somebody else can have it.
    app.rpc.bdev_wait_for_examine()
    assert not bdev_info(app.rpc, BETWEEN)["claimed"]
    # That another one has its name is noticed afterwards.
    app.rpc.bdev_passthru_delete(name=BETWEEN)
    app.rpc.call(**between(BASE))
    app.rpc.bdev_wait_for_examine()
    assert cache_state(app.rpc) == "opening"
    hold.let_go("munmap")
    wait_online(app.rpc)
    assert unmapping_threads(hold, app, storage) == ["pcache-unmap"]
    assert_intact(client.verify(IscsiTarget(app, CACHE).url))
    app.stop()


def test_a_delete_meanwhile_does_not_hide_why_there_is_no_cache(
    host: Host, media: Path, hold: Hold, seed: int, meanwhile
):
    storage = Storage(media)
    other = make_used_cache_between(host, storage, storage.client(seed))
    app = host.start("spdk_tgt", bdevs=[other, between(OTHER)], before_module=hold.library)
    app.rpc.bdev_wait_for_examine()
    hold.hold("munmap")
    created = meanwhile(app, "bdev_pcache_create", **storage.cache_params(BETWEEN))
    wait_unmapping(hold, app, storage)
    deleted = meanwhile(app, "bdev_pcache_delete", name=CACHE)
    hold.let_go("munmap")
    assert deleted.result() is True
    error = created.exception()
    assert isinstance(error, RpcError)
    assert error.code == -errno.EMEDIUMTYPE
    assert app.rpc.bdev_pcache_get_bdevs() == []
    app.stop()


def test_a_delete_meanwhile_is_no_less_one(host: Host, media: Path, hold: Hold, meanwhile):
    """The base has gone, with which the cache would come back."""
    storage = Storage(media)
    bdevs = [storage.malloc_base(), between(BASE), storage.cache(BETWEEN)]
    app = host.start("spdk_tgt", bdevs=bdevs, before_module=hold.library)
    wait_online(app.rpc)
    hold.hold("munmap")
    app.rpc.bdev_passthru_delete(name=BETWEEN)
    wait_unmapping(hold, app, storage)
    deleted = meanwhile(app, "bdev_pcache_delete", name=CACHE)
    assert cache_state(app.rpc) == "removing"
    assert not deleted.done()
    hold.let_go("munmap")
    assert deleted.result() is True
    assert app.rpc.bdev_pcache_get_bdevs() == []
    app.rpc.call(**between(BASE))
    app.rpc.bdev_wait_for_examine()
    assert app.rpc.bdev_pcache_get_bdevs() == []
    assert not bdev_info(app.rpc, BETWEEN)["claimed"]
    app.stop()
