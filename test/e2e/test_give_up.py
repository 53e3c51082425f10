# SPDX-License-Identifier: BSD-3-Clause
"""A delete while the cache device is being mapped: both who asked have their answer, and nothing is left."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from harness import App, Hold, Host, RpcError, wait_until
from harness.scenario import CACHE, MIB, Storage, wait_online

DELETE = ("bdev_pcache_delete", {"name": CACHE})
# Of a cache device of which the page tables are made at once.
STEP_MIB = 64


def assert_nothing_is_left(app: App, storage: Storage, cache_path: Path) -> None:
    assert app.rpc.bdev_pcache_get_bdevs() == []
    assert not cache_path.exists()
    # Base and cache device are free.
    app.rpc.bdev_pcache_create(**storage.cache_params())
    wait_online(app.rpc)


def test_a_delete_comes_before_the_mapping_fails(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base()])
    app.rpc.bdev_wait_for_examine()
    cache_path = media / "no folder" / "cache"
    params = storage.cache_params(cache_path=str(cache_path))
    created, deleted = app.rpc.call_at_once(("bdev_pcache_create", params), DELETE)
    assert deleted is True
    assert isinstance(created, RpcError)
    assert created.code == -errno.ECANCELED
    assert_nothing_is_left(app, storage, cache_path)
    app.stop()


def test_a_delete_comes_before_the_mapping_of_a_cache_that_waited_fails(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt")
    cache_path = media / "no folder" / "cache"
    app.rpc.bdev_pcache_create(**storage.cache_params(cache_path=str(cache_path)))
    base = storage.malloc_base()
    _, deleted = app.rpc.call_at_once((base["method"], base["params"]), DELETE)
    assert deleted is True
    app.rpc.bdev_wait_for_examine()
    assert_nothing_is_left(app, storage, cache_path)
    app.stop()


def test_what_is_not_wanted_any_more_is_not_populated(host: Host, media: Path, hold: Hold, meanwhile):
    storage = Storage(media, cache_mib=4 * STEP_MIB)
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base()], before_module=hold.library)
    app.rpc.bdev_wait_for_examine()
    hold.hold("madvise")
    created = meanwhile(app, "bdev_pcache_create", **storage.cache_params())

    def steps() -> list[str]:
        return hold.threads(app, "madvise", STEP_MIB * MIB)

    wait_until(steps, "page tables are made")
    deleted = meanwhile(app, "bdev_pcache_delete", name=CACHE)
    hold.let_go("madvise")
    assert deleted.result() is True
    error = created.exception()
    assert isinstance(error, RpcError)
    assert error.code == -errno.ECANCELED
    # The step that was under way was the last.
    assert steps() == ["pcache-map"]
    given_up = re.search(
        rf"{storage.cache_file}: given up with (\d+) of {4 * STEP_MIB} MiB populated", app.log()
    )
    assert given_up is not None
    assert int(given_up[1]) == STEP_MIB
    assert_nothing_is_left(app, storage, storage.cache_file)
    app.stop()
