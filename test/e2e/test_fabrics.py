# SPDX-License-Identifier: BSD-3-Clause
"""A cache exported by one application and used by another over NVMe-oF/TCP, and over iSCSI."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Bdevperf, Host, IscsiTarget, NvmfTarget
from harness.scenario import (
    BASE,
    CACHE,
    Storage,
    assert_intact,
    cache_info,
    drain_and_verify,
    start_session,
    wait_online,
)


@pytest.mark.parametrize("block_size", [512, 4096])
def test_nvmf_tcp(host: Host, need_app, media: Path, block_size: int):
    need_app("bdevperf")
    storage = Storage(media, block_size=block_size)
    target_app = host.start("nvmf_tgt", bdevs=[storage.malloc_base(), storage.cache()])
    wait_online(target_app.rpc, CACHE)
    target = NvmfTarget(target_app, CACHE)
    bdevperf = Bdevperf(host, [target.attach_config("Remote")], first_core=1)
    for io_size in (4096, 64 << 10, 256 << 10):
        result = bdevperf.run("verify", io_size=io_size, queue_depth=32, seconds=2)
        assert result.io_failed == 0
    result = bdevperf.run("randrw", io_size=4096, queue_depth=32, seconds=1, read_percent=50)
    assert result.io_failed == 0
    # NVMe-oF namespaces take these two as DATASET MANAGEMENT and WRITE ZEROES.
    for workload in ("unmap", "write_zeroes", "flush"):
        result = bdevperf.run(workload, io_size=4096, queue_depth=8, seconds=1)
        assert result.io_failed == 0
    bdevperf.stop()
    target_app.stop()


@pytest.mark.parametrize("enable_flush", [False, True])
def test_a_base_that_never_hears_of_a_flush_is_told_of(
    host: Host, media: Path, seed: int, enable_flush: bool
):
    """SPDK's NVMe bdevs drop FLUSH by default; its NVMe-oF target says that it has a volatile write cache."""
    storage = Storage(media)
    client = storage.client(seed)
    far = host.start("nvmf_tgt", bdevs=[storage.aio_base()])
    target = NvmfTarget(far, BASE)
    options = {"method": "bdev_nvme_set_options", "params": {"enable_flush": enable_flush}}
    bdevs = [options, target.attach_config("Remote"), storage.cache("Remoten1")]
    session = start_session(host, bdevs, first_core=1)
    info = cache_info(session.rpc)
    assert info is not None
    assert info["base_flush"] == ("sent" if enable_flush else "dropped")
    assert session.app.log().count("SPDK passes no FLUSH on") == (not enable_flush)
    assert_intact(client.write(session.url, seconds=1))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()
    far.stop()


def test_iscsi(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    app = host.start("iscsi_tgt", bdevs=[storage.aio_base(), storage.cache()], cores=2)
    wait_online(app.rpc, CACHE)
    target = IscsiTarget(app, CACHE)
    assert_intact(client.verify(target.url))
    assert_intact(client.write(target.url, seconds=3, depth=64, io_bytes="512:262144"))
    assert_intact(client.verify(target.url))
    drain_and_verify(app.rpc, client, storage)
    app.stop()
