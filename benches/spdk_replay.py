# SPDX-License-Identifier: BSD-3-Clause
"""A trace replayed through a real SPDK application: client, NVMe/TCP, bdev layer, pcache, an aio base."""

from __future__ import annotations

from pathlib import Path

from blocktrace import SECTOR_SIZE, Trace
from harness import AppFailed, Host, NvmfTarget, replay
from harness.ackclient import EXIT_DONE
from harness.scenario import CACHE, MIB, Storage, cache_stats, drain, wait_online

# What is kept free is no cache: this is a comparison with caches that keep nothing free. As in trace.rs.
GC_PERCENT = 90
# So much time has each request, and the start; one takes a tenth of a millisecond.
_REQUEST_S = 0.01
_START_S = 60.0
_DRAIN_S = 600.0
# The engine's own counters (src/engine/stats.rs), and what the application calls them.
_COUNTERS = {
    "read_pages": "requests.rd_pages",
    "read_missed_pages": "requests.rd_missed_pages",
    "base_read_bytes": "bytes.core_volume_rd",
    "writeback_bytes": "bytes.core_volume_wr",
}


def replay_spdk(host: Host, trace: Trace, commands: Path, folder: Path, cache_mib: int) -> dict[str, int]:
    """The counters of a new cache after the trace, when what was dirty in the end is on the base.

    One request is under way at a time. The base is a thin file of 512-byte blocks, as large as the trace asks
    for. The client speaks NVMe/TCP and not iSCSI, since SPDK makes several requests of one iSCSI command, cut
    anywhere.
    """
    storage = Storage(
        folder,
        base_mib=trace.base_blocks * SECTOR_SIZE // MIB,
        cache_mib=cache_mib,
        options={"gc_percent": GC_PERCENT},
    )
    try:
        with storage.base_file.open("wb") as base:
            base.truncate(storage.base_mib * MIB)
        app = host.start("nvmf_tgt", bdevs=[storage.aio_base(), storage.cache()])
        rpc = app.rpc
        wait_online(rpc)
        # Whoever looks for a partition table or a file system on a new bdev reads some of it.
        rpc.bdev_wait_for_examine()
        rpc.bdev_pcache_reset_stats(name=CACHE)
        timeout_s = _START_S + _REQUEST_S * len(trace.requests)
        result = replay(NvmfTarget(app, CACHE).url, commands, timeout_s)
        if result.exit_code != EXIT_DONE:
            raise AppFailed(
                f"the client ended with {result.exit_code}:\n{result.complaints}\n{app.log_tail()}"
            )
        drain(rpc, timeout_s=_DRAIN_S)
        stats = cache_stats(rpc)
        app.stop()
        return {counter: stats[name] for counter, name in _COUNTERS.items()}
    finally:
        host.forget_ended()
        storage.base_file.unlink(missing_ok=True)
        storage.cache_file.unlink(missing_ok=True)
