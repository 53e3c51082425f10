# SPDX-License-Identifier: BSD-3-Clause
"""bdevperf on a cache: everything it can verify, on one core and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Bdevperf, Host
from harness.scenario import Storage

SIZES = (512, 4096, 64 << 10, 1 << 20)
# A cache far smaller than the working set has to write back and reclaim all the time.
LARGE_MIB = 256
SMALL_MIB = 24


@pytest.mark.parametrize(
    ("cores", "block_size", "cache_mib"),
    [(1, 512, LARGE_MIB), (2, 512, SMALL_MIB), (1, 4096, SMALL_MIB), (2, 4096, LARGE_MIB)],
)
def test_verify(host: Host, need_app, media: Path, cores: int, block_size: int, cache_mib: int):
    need_app("bdevperf")
    storage = Storage(media, block_size=block_size, cache_mib=cache_mib)
    bdevperf = Bdevperf(host, [storage.malloc_base(), storage.cache()], cores=cores)
    for io_size in SIZES:
        if io_size >= block_size:
            result = bdevperf.run("verify", io_size=io_size, queue_depth=32, seconds=3)
            assert result.iops > 0
            assert result.io_failed == 0
    bdevperf.stop()


@pytest.mark.parametrize(
    ("workload", "io_size"),
    [
        ("randrw", 4096),
        ("randrw", 64 << 10),
        ("write_zeroes", 4096),
        ("unmap", 64 << 10),
        ("flush", 4096),
        ("write", 1 << 20),
    ],
)
def test_workload_runs_without_errors(host: Host, need_app, media: Path, workload: str, io_size: int):
    need_app("bdevperf")
    storage = Storage(media, cache_mib=SMALL_MIB)
    bdevperf = Bdevperf(host, [storage.malloc_base(), storage.cache()], cores=2)
    result = bdevperf.run(workload, io_size=io_size, queue_depth=64, seconds=1, read_percent=50)
    assert result.iops > 0
    assert result.io_failed == 0
    bdevperf.stop()


def test_verify_with_checksums_on_a_file(host: Host, need_app, media: Path):
    need_app("bdevperf")
    storage = Storage(media, cache_mib=SMALL_MIB)
    storage.options["data_crc"] = True
    storage.client()  # makes the base file
    bdevperf = Bdevperf(host, [storage.aio_base(), storage.cache()], cores=2)
    result = bdevperf.run("verify", io_size=4096, queue_depth=64, seconds=3)
    assert result.io_failed == 0
    bdevperf.stop()
