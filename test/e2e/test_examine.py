# SPDX-License-Identifier: BSD-3-Clause
"""A new base that other modules still look at, for a while: a create waits for them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from harness import App, Host, IscsiTarget, Rpc, RpcError, wait_until
from harness.scenario import BASE, CACHE, MIB, Storage, cache_info, error_of, wait_online

SLOW = "Slow0"
# Others look for partitions and logical volumes, which takes several reads.
LATENCY_US = 500_000


def slow(name: str = SLOW, base: str = BASE) -> dict[str, Any]:
    """A bdev that takes its time, over `base`."""
    latencies = ("avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency")
    params = {"base_bdev_name": base, "name": name, **dict.fromkeys(latencies, LATENCY_US)}
    return {"method": "bdev_delay_create", "params": params}


def storage_on(media: Path, name: str = "first") -> Storage:
    """Small: what is read of the base takes long."""
    folder = media / name
    folder.mkdir()
    return Storage(folder, block_size=4096, base_mib=8, cache_mib=64)


def awaits_examinations(rpc: Rpc) -> bool:
    """Whether the cache is not there yet because of them."""
    info = cache_info(rpc)
    return info is not None and info["state"] == "pending" and "examined" in info["reason"]


def test_caches_of_a_configuration_wait_for_the_examination_of_their_bases(host: Host, media: Path):
    first, second = storage_on(media), storage_on(media, "second")
    bdevs = [
        # The first cache waits for its base, whose examination it then holds until it is there itself.
        first.cache(SLOW),
        first.malloc_base(),
        slow(),
        # The second one comes when its base is there, and waits for both examinations.
        second.malloc_base("Base1"),
        slow("Slow1", "Base1"),
        second.cache("Slow1", name="Cache1"),
    ]
    app = host.start("spdk_tgt", bdevs=bdevs)
    wait_online(app.rpc, CACHE)
    wait_online(app.rpc, "Cache1")
    app.stop()


def waiting_create(host: Host, storage: Storage, meanwhile: Callable[..., Future]) -> tuple[App, Future]:
    """A create that was called while its base was being examined, and waits for that."""
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base()])
    app.rpc.bdev_wait_for_examine()
    app.rpc.call(**slow())
    create = meanwhile(app, "bdev_pcache_create", **storage.cache_params(SLOW))
    wait_until(lambda: awaits_examinations(app.rpc), "the create waits", timeout_s=5)
    return app, create


def test_a_create_that_waits_can_be_given_up(host: Host, media: Path, meanwhile):
    storage = storage_on(media)
    app, create = waiting_create(host, storage, meanwhile)
    assert error_of(app.rpc.bdev_pcache_get_stats, name=CACHE).code == -errno.ENXIO
    assert error_of(app.rpc.bdev_pcache_delete, name=CACHE, drain=True).code == -errno.EBUSY
    app.rpc.bdev_pcache_delete(name=CACHE)
    error = create.exception(timeout=60)
    assert isinstance(error, RpcError)
    assert error.code == -errno.ECANCELED
    assert app.rpc.bdev_pcache_get_bdevs() == []
    # Nothing of it is left when the examination ends, and so the next one gets through.
    app.rpc.bdev_pcache_create(**storage.cache_params(SLOW))
    wait_online(app.rpc, CACHE)
    app.stop()


def test_an_application_ends_while_a_create_waits(host: Host, media: Path, meanwhile):
    app, create = waiting_create(host, storage_on(media), meanwhile)
    app.stop()
    create.exception(timeout=60)


def test_a_base_that_is_written_to_by_others_is_still_refused(host: Host, media: Path, meanwhile):
    storage = storage_on(media)
    other = {"name": "Other0", "num_blocks": MIB // 4096, "block_size": 4096}
    bdevs = [storage.malloc_base(), {"method": "bdev_malloc_create", "params": other}]
    app = host.start("spdk_tgt", bdevs=bdevs)
    app.rpc.bdev_wait_for_examine()
    IscsiTarget(app, BASE)
    refused = error_of(app.rpc.bdev_pcache_create, **storage.cache_params())
    assert refused.code == -errno.EPERM
    assert BASE in refused.message
    # The same, once the examination of another bdev has been waited for.
    app.rpc.call(**slow(base="Other0"))
    create = meanwhile(app, "bdev_pcache_create", **storage.cache_params())
    wait_until(lambda: awaits_examinations(app.rpc), "the create waits", timeout_s=5)
    error = create.exception(timeout=60)
    assert isinstance(error, RpcError)
    assert (error.code, error.message) == (refused.code, refused.message)
    assert not storage.cache_file.exists()
    app.stop()
