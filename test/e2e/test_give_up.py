# SPDX-License-Identifier: BSD-3-Clause
"""A delete while the cache device is being mapped: both who asked have their answer, and nothing is left."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from harness import App, Host, RpcError
from harness.scenario import CACHE, Storage, wait_online

DELETE = ("bdev_pcache_delete", {"name": CACHE})


def assert_nothing_is_left(app: App, storage: Storage) -> None:
    assert app.rpc.bdev_pcache_get_bdevs() == []
    assert not storage.cache_file.exists()
    # Base and cache device are free.
    app.rpc.bdev_pcache_create(**storage.cache_params())
    wait_online(app.rpc)


def test_a_delete_comes_before_the_mapping_fails(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base()])
    app.rpc.bdev_wait_for_examine()
    params = storage.cache_params(cache_path=str(media / "no folder" / "cache"))
    created, deleted = app.rpc.call_at_once(("bdev_pcache_create", params), DELETE)
    assert deleted is True
    assert isinstance(created, RpcError)
    assert created.code == -errno.ECANCELED
    assert_nothing_is_left(app, storage)
    app.stop()


def test_a_delete_comes_before_the_mapping_of_a_cache_that_waited_fails(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt")
    app.rpc.bdev_pcache_create(**storage.cache_params(cache_path=str(media / "no folder" / "cache")))
    base = storage.malloc_base()
    _, deleted = app.rpc.call_at_once((base["method"], base["params"]), DELETE)
    assert deleted is True
    app.rpc.bdev_wait_for_examine()
    assert_nothing_is_left(app, storage)
    app.stop()


def test_what_is_not_wanted_any_more_is_not_populated(host: Host, media: Path):
    storage = Storage(media, cache_mib=256)
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base()])
    app.rpc.bdev_wait_for_examine()
    create = ("bdev_pcache_create", storage.cache_params())
    created, deleted = app.rpc.call_at_once(create, DELETE)
    assert deleted is True
    assert isinstance(created, RpcError)
    assert created.code == -errno.ECANCELED
    given_up = re.search(rf"{storage.cache_file}: given up with (\d+) of 256 MiB populated", app.log())
    assert given_up is not None
    assert int(given_up[1]) < 256
    assert_nothing_is_left(app, storage)
    app.stop()
