# SPDX-License-Identifier: BSD-3-Clause
"""Unmapping a large cache device takes long: no reactor waits, and the cache can be deleted meanwhile."""

from __future__ import annotations

import errno
import re
import subprocess
from pathlib import Path

import pytest
from harness import ROOT, App, Host, wait_until
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    SLOW,
    Storage,
    bdev_info,
    cache_state,
    error_of,
    make_used_cache,
    set_latency,
    wait_online,
)

BETWEEN = "Between"


@pytest.fixture(scope="module")
def slow_unmap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes it take long."""
    library = tmp_path_factory.mktemp("preload") / "slow_unmap.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, ROOT / "test/preload/slow_unmap.c"], check=True)
    return library


def unmapping_threads(app: App, storage: Storage) -> list[str]:
    """Who has unmapped the cache device, or has begun to."""
    size_bytes = storage.cache_mib * MIB
    return re.findall(rf"slow_unmap: {size_bytes} bytes, on (\S+)", app.log())


def test_a_cache_that_is_refused_is_unmapped_by_another_thread(host: Host, media: Path, slow_unmap: Path):
    storage = Storage(media)
    make_used_cache(host, storage, storage.client(), drained=True)
    bdevs = [storage.aio_base("Other0")]
    app = host.start("spdk_tgt", bdevs=bdevs, before_module=slow_unmap)
    error = error_of(app.rpc.bdev_pcache_create, **storage.cache_params("Other0"))
    assert error.code == -errno.EMEDIUMTYPE
    # Its answer came when that had ended: the device can be had.
    assert unmapping_threads(app, storage) == ["pcache-map"]
    app.rpc.bdev_pcache_create(**storage.cache_params("Other0", format="force"))
    app.stop()


def test_a_cache_that_is_given_up_is_unmapped_by_another_thread(
    host: Host, media: Path, slow_unmap: Path, meanwhile
):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=storage.slow_base(), before_module=slow_unmap)
    set_latency(app.rpc, "read", 1_000_000)
    created = meanwhile(app, "bdev_pcache_create", **storage.cache_params(SLOW))
    # What the base holds is noted in a new cache.
    wait_until(lambda: f"{storage.cache_file} is kill-safe" in app.log(), "the cache device is mapped")
    assert cache_state(app.rpc) == "opening"
    assert app.rpc.bdev_pcache_delete(name=CACHE) is True
    assert created.exception().code == -errno.ECANCELED
    assert not storage.cache_file.exists()
    assert unmapping_threads(app, storage) == ["pcache-unmap"]
    app.stop()


def test_a_delete_meanwhile_is_no_less_one(host: Host, media: Path, slow_unmap: Path):
    """The base has gone, with which the cache would come back."""
    storage = Storage(media)
    passthru = {"name": BETWEEN, "base_bdev_name": BASE}
    bdevs = [
        storage.malloc_base(),
        {"method": "bdev_passthru_create", "params": passthru},
        storage.cache(BETWEEN),
    ]
    app = host.start("spdk_tgt", bdevs=bdevs, before_module=slow_unmap)
    wait_online(app.rpc)
    app.rpc.bdev_passthru_delete(name=BETWEEN)
    wait_until(lambda: unmapping_threads(app, storage), "the cache device is unmapped")
    assert cache_state(app.rpc) == "removing"
    assert app.rpc.bdev_pcache_delete(name=CACHE) is True
    assert app.rpc.bdev_pcache_get_bdevs() == []
    app.rpc.bdev_passthru_create(**passthru)
    app.rpc.bdev_wait_for_examine()
    assert app.rpc.bdev_pcache_get_bdevs() == []
    assert not bdev_info(app.rpc, BETWEEN)["claimed"]
    app.stop()
