# SPDX-License-Identifier: BSD-3-Clause
"""ZCOPY: reads that look into the cache device, writes that fill memory of the target's."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import AckClient, App, AppFailed, Bdevperf, Host, IscsiTarget, NvmfTarget
from harness.ackclient import EXIT_DISCONNECTED
from harness.rpc import RpcConnectionLost
from harness.scenario import (
    CACHE,
    Storage,
    assert_intact,
    bdev_info,
    cache_info,
    cache_stats,
    drain,
    wait_online,
)
from harness.util import wait_until

REMOTE = "Remote"
# Far smaller than the working set: segments are reclaimed all the time, lent ones among them.
SMALL_MIB = 24


@pytest.mark.parametrize(
    ("cores", "block_size", "cache_mib"),
    [(1, 512, SMALL_MIB), (2, 4096, SMALL_MIB), (2, 512, 256)],
)
def test_bdevperf(host: Host, need_app, media: Path, cores: int, block_size: int, cache_mib: int):
    need_app("bdevperf")
    storage = Storage(media, block_size=block_size, cache_mib=cache_mib)
    bdevperf = Bdevperf(host, [storage.malloc_base(), storage.cache()], cores=cores, zero_copy=True)
    for io_size in (block_size, 4096, 64 << 10):
        result = bdevperf.run("verify", io_size=io_size, queue_depth=32, seconds=2)
        assert result.iops > 0
        assert result.io_failed == 0
    result = bdevperf.run("randrw", io_size=4096, queue_depth=64, seconds=2, read_percent=50)
    assert result.io_failed == 0
    counters = cache_stats(bdevperf.app.rpc)
    assert counters["requests.rd_lent"] > 0
    if cache_mib == SMALL_MIB:
        assert counters["gc.segments_reclaimed"] > 0
    bdevperf.stop()


def test_not_offered_where_a_write_would_not_fit(host: Host, media: Path):
    """A ZCOPY write is not split, so with small segments there is none."""
    for segment_size_kib, offered in ((256, False), (1024, True)):
        folder = media / str(segment_size_kib)
        folder.mkdir()
        storage = Storage(folder, options={"segment_size_kib": segment_size_kib})
        app = host.start("spdk_tgt", bdevs=[storage.malloc_base(), storage.cache()])
        wait_online(app.rpc)
        info = bdev_info(app.rpc, CACHE)
        assert info is not None
        assert info["supported_io_types"]["zcopy"] is offered
        app.stop()


def start_target(host: Host, storage: Storage, **options: Any) -> tuple[App, NvmfTarget]:
    app = host.start("nvmf_tgt", bdevs=[storage.aio_base(), storage.cache()], **options)
    wait_online(app.rpc)
    return app, NvmfTarget(app, CACHE, zcopy=True)


def start_front(host: Host, target: NvmfTarget) -> tuple[App, str]:
    """For the client, which speaks iSCSI: another application that uses the target."""
    front = host.start("iscsi_tgt", bdevs=[target.attach_config(REMOTE)], first_core=1)
    bdev = f"{REMOTE}n1"
    wait_until(lambda: bdev_info(front.rpc, bdev), f"{bdev} is attached")
    return front, IscsiTarget(front, bdev).url


@pytest.mark.parametrize(("block_size", "cache_mib"), [(512, SMALL_MIB), (4096, 64)])
def test_nvmf_tcp(host: Host, media: Path, seed: int, block_size: int, cache_mib: int):
    storage = Storage(media, block_size=block_size, cache_mib=cache_mib)
    client = storage.client(seed)
    app, target = start_target(host, storage)
    front, url = start_front(host, target)
    assert_intact(client.verify(url))
    assert_intact(client.write(url, seconds=3, depth=64, io_bytes="8192:131072"))
    counters = cache_stats(app.rpc)
    # A write that comes by ZCOPY counts as one with FUA.
    assert counters["requests.wr_fua"] > counters["requests.wr_total"] * 9 // 10
    # Smaller ones come within their commands, and do not use it.
    assert_intact(client.write(url, seconds=2, depth=64, io_bytes="512:131072"))
    assert_intact(client.verify(url))
    assert_intact(client.verify(url))
    counters = cache_stats(app.rpc)
    assert counters["requests.rd_lent"] > 0
    if cache_mib == SMALL_MIB:
        assert counters["gc.segments_reclaimed"] > 0
    front.stop()
    drain(app.rpc)
    # Everything that was lent has come back: nothing is in the way of deleting it.
    app.rpc.nvmf_delete_subsystem(nqn=target.NQN)
    app.rpc.bdev_pcache_delete(name=CACHE)
    app.stop()
    assert_intact(client.verify_file(storage.base_file))


@pytest.mark.slow
def test_kill(
    request: pytest.FixtureRequest,
    host: Host,
    media: Path,
    seed: int,
    ended_client: list[AckClient],
):
    """The host goes, and soon after it the target, with loans and writes under way."""
    storage = Storage(media, cache_mib=SMALL_MIB)
    client = storage.client(seed)
    ended_client.append(client)
    dice = random.Random(seed)
    acked = client.writes_acked()
    for _ in range(max(2, request.config.getoption("--kill-rounds") // 10)):
        app, target = start_target(host, storage)
        front, url = start_front(host, target)
        assert_intact(client.verify(url))
        client.start_writing(url, seconds=60, depth=dice.choice([1, 16, 64]))
        time.sleep(dice.uniform(0.05, 1.0))
        front.kill()
        time.sleep(dice.choice([0.0, 0.02]))
        app.kill()
        result = client.finish_writing()
        assert result.exit_code == EXIT_DISCONNECTED, f"{result.summary}\n{result.complaints}"
    assert client.writes_acked() > acked
    app, target = start_target(host, storage)
    front, url = start_front(host, target)
    assert_intact(client.verify(url))
    front.stop()
    app.stop()


def read_while_it_lasts(bdevperf: Bdevperf) -> None:
    with contextlib.suppress(AppFailed, RpcConnectionLost):
        bdevperf.run("randread", io_size=4096, queue_depth=64, seconds=1)


def test_reset_while_reads_are_lent(host: Host, need_app, media: Path):
    """During a reset SPDK ends requests by itself: their loans must not stay."""
    need_app("bdevperf")
    storage = Storage(media, cache_mib=256)
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base(), storage.cache()])
    wait_online(app.rpc)
    resetter = IscsiTarget(app, CACHE)
    target = NvmfTarget(app, CACHE, zcopy=True)
    for _ in range(10):
        # A read that a reset ends may fail, and bdevperf ends with it.
        bdevperf = Bdevperf(host, [target.attach_config(REMOTE)], first_core=1)
        bdevperf.run("write", io_size=64 << 10, queue_depth=32, seconds=1)
        reader = threading.Thread(target=read_while_it_lasts, args=(bdevperf,))
        reader.start()
        resetter.reset_lun(100)
        reader.join()
        bdevperf.app.kill()
        if "were ended by a reset" in app.log():
            break
    else:
        pytest.fail("no reset met a loan")

    # Nothing is lent any more, so everything can be reclaimed but the segments that are written to: those of
    # two cores, and those for what reclaiming keeps and for read fills on probation.
    open_segments_max = 2 + 3
    drain(app.rpc)
    app.rpc.bdev_pcache_set_options(name=CACHE, gc_percent=0)

    def reclaimed() -> bool:
        info = cache_info(app.rpc)
        assert info is not None
        return info["segment_count"] - info["segments_free"] <= open_segments_max

    wait_until(reclaimed, "all segments are reclaimed")
    app.stop()
