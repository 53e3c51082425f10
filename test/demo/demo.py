#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""pcache at work, with real parts: see what it gives, kill it, and count what is lost.

A file plays the persistent memory, a file behind an aio bdev is the base device, a stock SPDK
application serves them. The last line of the output is one JSON object; the exit status is 0 only
if nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from harness import ROOT, App, Bdevperf, ClientResult, Host, IscsiTarget, WorkloadResult
from harness.ackclient import EXIT_DISCONNECTED
from harness.scenario import CACHE, MIB, Storage, cache_info, wait_online

BASE_MIB = 256
CACHE_MIB = 512
# A disk may have sectors of 4 KiB, and O_DIRECT then takes nothing smaller.
BLOCK_SIZE = 4096
BENCH_SECONDS = 2
# Random 4 KiB writes and reads; an unmap would be no write.
LOAD = {
    "aligned": True,
    "io_bytes": "4096:4096",
    "depth": 32,
    "read_percent": 30,
    "unmap_percent": 0,
    "flush_percent": 1,
}


class LostData(Exception):
    """Something that was acknowledged is not there."""


class Demo:
    """The stages, in order; what they find out ends up in `result`."""

    def __init__(self, host: Host, memory: Path, disk: Path) -> None:
        self.host = host
        self.started_s = time.monotonic()
        self.storage = Storage(memory, BLOCK_SIZE, BASE_MIB, CACHE_MIB, options={})
        self.disk = disk
        # The base is on the disk, the cache in memory.
        self.base_file = disk / "base.img"
        self.client = self.storage.client(seed=random.SystemRandom().randrange(1 << 32), fill_base=False)
        self.result: dict[str, Any] = {
            "acked_writes": 0,
            "acked_writes_lost": None,
            "torn_writes": None,
            "recovery_ms": None,
            "base_identical": False,
        }

    def run(self) -> None:
        """All of it."""
        self.tell_parts()
        self.compare_speed()
        self.fill_base()
        self.write_and_kill()
        app = self.recover()
        self.drain_and_delete(app)
        self.check_base()

    def say(self, text: str) -> None:
        """One line, with the time since the start."""
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)

    def tell_parts(self) -> None:
        """What stands in for what."""
        spdk, storage = self.host.spdk, self.storage
        self.say(f"SPDK {spdk.version}, unmodified, with {self.host.module.name} preloaded")
        huge = self.host.hugepages.free_mib()
        self.say(f"memory of the applications: {f'hugepages ({huge} MiB free)' if huge else 'no hugepages'}")
        self.say(f"persistent memory: {CACHE_MIB} MiB, the file {storage.cache_file}")
        self.say("    (a file in memory: it outlives a killed process as persistent memory does,")
        self.say('    but not a power cut; pcache reports it as durability "process")')
        self.say(f"base device: {BASE_MIB} MiB, the file {self.base_file} behind an aio bdev")

    # ---- speed ------------------------------------------------------------------------------

    def compare_speed(self) -> None:
        """The same workloads on the cache and on the bare base."""
        self.say(f"bdevperf, 4 KiB, one core, {BENCH_SECONDS} s each: the cache, and the base alone")
        with self.base_made() as base:
            cached = self.measure([base, self.storage.cache(segment_size_kib=None)])
        self.storage.cache_file.unlink(missing_ok=True)
        with self.base_made() as base:
            bare = self.measure([base])
        header = f"{'':24}{'pcache':>12}{'':>14}{'base alone':>16}"
        self.say(header)
        self.say(f"{'':24}{'IOPS':>12}{'latency us':>14}{'IOPS':>16}{'latency us':>14}")
        for what, ours in cached.items():
            theirs = bare[what]
            self.say(
                f"{what:24}{ours.iops:12,.0f}{ours.latency_us:14.1f}"
                f"{theirs.iops:16,.0f}{theirs.latency_us:14.1f}"
            )
            key = what.replace(" ", "_")
            self.result[f"{key}_iops"] = round(ours.iops)
            self.result[f"{key}_iops_base"] = round(theirs.iops)

    @contextmanager
    def base_made(self) -> Iterator[dict[str, Any]]:
        """A base full of data, since holes in a file are faster than a disk."""
        with self.base_file.open("wb") as file:
            for _ in range(BASE_MIB):
                file.write(random.randbytes(MIB))
        yield self.aio_base()
        self.base_file.unlink()

    def measure(self, bdevs: list[dict[str, Any]]) -> dict[str, WorkloadResult]:
        """Random writes and reads, alone and 32 at a time."""
        bdevperf = Bdevperf(self.host, bdevs)
        results = {}
        for workload in ("randwrite", "randread"):
            for depth in (1, 32):
                results[f"{workload} qd{depth}"] = bdevperf.run(
                    workload, io_size=4096, queue_depth=depth, seconds=BENCH_SECONDS
                )
        bdevperf.stop()
        return results

    # ---- durability -------------------------------------------------------------------------

    def aio_base(self) -> dict[str, Any]:
        """The base on the disk."""
        entry = self.storage.aio_base()
        entry["params"]["filename"] = str(self.base_file)
        return entry

    def start_with_cache(self) -> tuple[App, IscsiTarget, float]:
        """Starts the application, creates the cache by RPC and exports it. Returns also how long
        the cache took to come online, in milliseconds."""
        app = self.host.start("spdk_tgt", bdevs=[self.aio_base()])
        started_s = time.monotonic()
        app.rpc.call("bdev_pcache_create", self.storage.cache_params(segment_size_kib=None))
        wait_online(app.rpc, CACHE)
        online_ms = (time.monotonic() - started_s) * 1000
        return app, IscsiTarget(app, CACHE), online_ms

    def fill_base(self) -> None:
        """The base belongs to the user: it may hold data before there is a cache."""
        self.say("filling the base with known data, as a disk that is in use already")
        self.client.create(self.base_file)

    def write_and_kill(self) -> None:
        """SIGKILL in the middle of writes."""
        app, target, _ = self.start_with_cache()
        info = cache_info(app.rpc)
        self.say(f"spdk_tgt runs; cache created by RPC: {info['state']}, durability {info['durability']}")
        self.say("a client in another process writes and reads random 4 KiB over iSCSI, checks what it")
        self.say("    reads, and keeps a journal of what was acknowledged")
        self.client.start_writing(target.url, seconds=60, **LOAD)
        deadline = time.monotonic() + random.uniform(3.0, 5.0)
        while time.monotonic() < deadline:
            time.sleep(1.0)
            self.say(f"    {self.client.writes_acked():,} writes acknowledged")
        app.kill()
        result = self.client.finish_writing()
        if result.exit_code != EXIT_DISCONNECTED:
            raise LostData(f"before the kill: {result.summary} {result.complaints}")
        self.say(f"SIGKILL to spdk_tgt after {self.client.writes_acked():,} acknowledged writes")

    def recover(self) -> App:
        """Start again; everything must be there."""
        app, target, online_ms = self.start_with_cache()
        self.result["recovery_ms"] = round(online_ms, 1)
        self.say(f"spdk_tgt runs again; the cache is back after {online_ms:.1f} ms")
        result = self.client.verify(target.url)
        self.record(result)
        self.say(
            f"all {BASE_MIB} MiB read back: {result.summary.get('lost_writes')} acknowledged writes lost, "
            f"{result.summary.get('torn_writes')} torn; "
            f"{result.summary.get('interrupted_writes')} were under way at the kill"
        )
        if result.exit_code != 0:
            raise LostData(result.complaints)
        written = self.client.write(target.url, seconds=2, **LOAD)
        if written.exit_code != 0:
            raise LostData(f"after recovery: {written.summary} {written.complaints}")
        self.say(f"work goes on: {self.client.writes_acked():,} writes acknowledged")
        return app

    def record(self, result: ClientResult) -> None:
        """Adds a verdict of the client to the result."""
        for name, key in (("acked_writes_lost", "lost_writes"), ("torn_writes", "torn_writes")):
            self.result[name] = (self.result[name] or 0) + result.summary.get(key, 0)

    def drain_and_delete(self, app: App) -> None:
        """Afterwards the base needs no cache any more."""
        app.rpc.bdev_pcache_flush_start(name=CACHE)
        while True:
            status = app.rpc.bdev_pcache_flush_status(name=CACHE)
            left = status["dirty_bytes_left"] / MIB
            self.say(f"drain: {status['percent']} %, {left:,.1f} MiB left")
            if not status["in_progress"]:
                break
            time.sleep(0.5)
        app.rpc.bdev_pcache_delete(name=CACHE)
        app.stop()
        self.say("cache deleted, spdk_tgt ended")

    def check_base(self) -> None:
        """Byte for byte, from the file, without SPDK and pcache."""
        result = self.client.verify_file(self.base_file)
        self.record(result)
        self.result["base_identical"] = result.exit_code == 0
        self.say(
            f"{self.base_file.name} read without pcache: "
            f"{'identical, byte for byte' if result.exit_code == 0 else 'DIFFERENT'}"
        )
        if result.exit_code != 0:
            raise LostData(result.complaints)


@contextmanager
def folders(keep: bool) -> Iterator[tuple[Path, Path]]:
    """A folder in memory and one on the disk, gone afterwards."""
    disk_parent = ROOT / "target/demo"
    disk_parent.mkdir(parents=True, exist_ok=True)
    memory_parent = Path("/dev/shm")
    needed = (CACHE_MIB + 64) * MIB
    if not memory_parent.is_dir() or shutil.disk_usage(memory_parent).free < needed:
        print("/dev/shm is too small: the persistent memory is a file on the disk", flush=True)
        memory_parent = disk_parent
    memory = Path(tempfile.mkdtemp(prefix="pcache-demo-", dir=memory_parent))
    disk = Path(tempfile.mkdtemp(prefix="pcache-demo-", dir=disk_parent))
    try:
        yield memory, disk
    finally:
        if keep:
            print(f"kept: {memory} {disk}", flush=True)
        else:
            shutil.rmtree(memory)
            shutil.rmtree(disk)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-huge", action="store_true", help="use no hugepages even if there are some")
    parser.add_argument("--keep", action="store_true", help="keep the files of cache and base")
    args = parser.parse_args()
    # Cleaning up is done on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with folders(args.keep) as (memory, disk), Host(hugepages=not args.no_huge) as host:
        demo = Demo(host, memory, disk)
        status = 1
        try:
            demo.run()
            status = 0
        except LostData as error:
            demo.say(f"DATA LOST: {error}")
        except Exception as error:
            demo.say(f"failed: {error}")
        finally:
            demo.client.end()
        if demo.client.journal.exists():
            demo.result["acked_writes"] = demo.client.writes_acked()
        demo.result["ok"] = status == 0
    print(json.dumps(demo.result), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
