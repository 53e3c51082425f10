# SPDX-License-Identifier: BSD-3-Clause
"""In steady state the module asks the heap for nothing: neither the adapter nor the engine in it.

Requests of all kinds are under way while it is counted, and so are write-back and reclaiming. Nobody calls an
RPC of the module meanwhile, whose answer would be made of allocations.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import Bdevperf, Host, NvmfTarget
from harness.allocations import Allocations
from harness.rpc import Rpc
from harness.scenario import Storage, assert_intact, cache_info, cache_stats, start_session
from harness.util import wait_until

# Far smaller than what is written and read: it has to write back and reclaim all the time.
SMALL_MIB = 24
# Until all jobs, connections and channels are there: so long at the least, and until each kind has gone on.
WARM_UP_S = 1.5
# It is counted so often at the least, for so long; more often on a busy machine, until enough has gone on.
TIMES_MIN = 4
COUNTED_S = 0.5
RUN_S = 12
# So long before the end of the run nothing is counted any more: what is closed then is freed.
SPARE_S = 2
# What must have gone on while it was counted, at the least.
GOES_ON = {
    "requests.rd_total": 1000,
    "requests.wr_total": 1000,
    "bytes.core_volume_rd": 1 << 20,
    "bytes.core_volume_wr": 1 << 20,
    "gc.segments_reclaimed": 10,
}

JOBS = """
[global]
filename=Cache0
[small]
rw=randrw
bs=4096
iodepth=64
rwmixread=50
[blocks]
rw=randrw
bs=512
iodepth=32
rwmixread=30
[single]
rw=randwrite
bs=4096
iodepth=1
[scan]
rw=read
bs=65536
iodepth=8
"""
# Requests of these sizes and kinds do not borrow memory.
COPIED_JOBS = """
[large]
rw=rw
bs=1048576
iodepth=4
rwmixread=50
[unmap]
rw=unmap
bs=65536
iodepth=4
[zeroes]
rw=write_zeroes
bs=65536
iodepth=4
[flush]
rw=flush
bs=4096
iodepth=2
"""


@pytest.fixture
def allocations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """For applications that are started with its library `before_module`."""
    allocations = Allocations(tmp_path)
    for name, value in allocations.environment.items():
        monkeypatch.setenv(name, value)
    return allocations


def assert_none_amid_a_load(allocations: Allocations, rpc: Rpc, *kinds: str) -> None:
    """While a load that has just been started goes on, in which there are requests of these kinds."""
    end_s = time.monotonic() + RUN_S - SPARE_S
    cold = cache_stats(rpc)
    time.sleep(WARM_UP_S)

    def has_begun() -> bool:
        now = cache_stats(rpc)
        return all(now[f"requests.{kind}"] > cold[f"requests.{kind}"] for kind in kinds)

    wait_until(has_begun, f"there are requests of each kind: {kinds}", RUN_S - SPARE_S - WARM_UP_S)
    least = GOES_ON | {f"requests.{kind}": 1 for kind in kinds}
    before = cache_stats(rpc)
    missing = least
    times = 0
    while times < TIMES_MIN or missing:
        assert time.monotonic() + COUNTED_S < end_s, f"too little goes on; missing: {missing}"
        allocations.begin()
        time.sleep(COUNTED_S)
        counted = allocations.end()
        assert counted == (0, 0), allocations.origins()
        after = cache_stats(rpc)
        missing = {name: count for name, count in least.items() if after[name] - before[name] < count}
        times += 1
    # That it would have been seen: the answer to an RPC is made of allocations.
    allocations.begin()
    cache_stats(rpc)
    allocated, freed = allocations.end()
    assert allocated > 10
    assert freed > 10


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("base", ["malloc", "aio"])
def test_bdevperf(host: Host, need_app, media: Path, allocations: Allocations, base: str, zero_copy: bool):
    need_app("bdevperf")
    jobs = media / "jobs.conf"
    jobs.write_text(JOBS if zero_copy else JOBS + COPIED_JOBS)
    storage = Storage(media, cache_mib=SMALL_MIB)
    below = storage.malloc_base() if base == "malloc" else storage.aio_base()
    if base == "aio":
        storage.client()  # makes the base file
    bdevperf = Bdevperf(
        host,
        [below, storage.cache(data_crc=True)],
        cores=2,
        zero_copy=zero_copy,
        jobs_file=jobs,
        before_module=allocations.library,
    )
    with ThreadPoolExecutor() as pool:
        run = pool.submit(bdevperf.run, "randrw", io_size=4096, queue_depth=64, seconds=RUN_S)
        # Another connection than the one that waits for the end of the run.
        kinds = ("rd_lent",) if zero_copy else ("unmaps", "write_zeroes", "flushes")
        assert_none_amid_a_load(allocations, Rpc(bdevperf.app.socket_path), *kinds)
        assert run.result().io_failed == 0
    bdevperf.stop()


@pytest.mark.parametrize("zero_copy", [False, True])
def test_nvmf_tcp(host: Host, media: Path, allocations: Allocations, seed: int, zero_copy: bool):
    storage = Storage(media, cache_mib=SMALL_MIB)
    client = storage.client(seed)
    # With a bdev in between of which nobody knows what it does with addresses.
    session = start_session(
        host,
        storage.sick_base(),
        target=lambda app, bdev: NvmfTarget(app, bdev, zcopy=zero_copy),
        cores=2,
        before_module=allocations.library,
    )
    info = cache_info(session.rpc)
    assert info is not None
    assert info["base_write_path"].endswith("bounce buffers")
    shares = {
        "read_percent": 30,
        "unmap_percent": 4,
        "zero_percent": 4,
        "fua_percent": 10,
        "flush_percent": 4,
    }
    client.start_writing(session.url, seconds=RUN_S, depth=64, io_bytes="512:131072", **shares)
    assert_none_amid_a_load(allocations, session.rpc, "wr_fua", "unmaps", "write_zeroes", "flushes")
    assert_intact(client.finish_writing())
    assert_intact(client.verify(session.url))
    session.app.stop()
