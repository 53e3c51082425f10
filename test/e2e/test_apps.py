# SPDX-License-Identifier: BSD-3-Clause
"""The module loads into each of SPDK's applications, unmodified."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Host
from harness.scenario import CACHE, Storage, cache_info, wait_online


@pytest.mark.parametrize(
    ("name", "cores", "arguments"),
    [
        ("spdk_tgt", 1, []),
        ("nvmf_tgt", 1, []),
        ("iscsi_tgt", 1, []),
        ("vhost", 1, []),
        ("bdevperf", 1, ["-z", "-q", "1", "-o", "4096", "-w", "read", "-t", "1"]),
        ("bdevio", 3, ["-w"]),
    ],
)
def test_cache_in_application(host: Host, need_app, media: Path, name: str, cores: int, arguments: list[str]):
    need_app(name)
    storage = Storage(media)
    if name == "vhost":
        # It keeps its sockets in the current folder unless told otherwise.
        arguments = ["-S", str(media)]
    bdevs = [storage.malloc_base(), storage.cache()]
    app = host.start(name, bdevs=bdevs, cores=cores, arguments=arguments)
    wait_online(app.rpc, CACHE)
    assert cache_info(app.rpc)["state"] == "online"
    assert app.rpc.bdev_pcache_delete(name=CACHE) is True
    app.stop()


def test_several_caches_in_one_application(host: Host, media: Path):
    bdevs = []
    for number in range(4):
        folder = media / str(number)
        folder.mkdir()
        storage = Storage(folder, base_mib=32, cache_mib=16)
        base = f"Base{number}"
        bdevs += [storage.malloc_base(base), storage.cache(base, name=f"Cache{number}")]
    app = host.start("spdk_tgt", bdevs=bdevs, cores=2)
    for number in range(4):
        wait_online(app.rpc, f"Cache{number}")
    assert len(app.rpc.bdev_pcache_get_bdevs()) == 4
    app.stop()
