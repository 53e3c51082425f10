# SPDX-License-Identifier: BSD-3-Clause
"""Runs everything: the peers with their workloads, and what needs a scene of its own."""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import native
import peers
from figures import Figures
from harness import (
    ROOT,
    AppFailed,
    Bdevperf,
    Host,
    NvmfTarget,
    Rpc,
    RpcConnectionLost,
    RpcError,
    WorkloadResult,
    build_preload,
    wait_until,
)
from harness.ackclient import EXIT_DONE
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    Storage,
    bdev_info,
    cache_info,
    cache_stats,
    drain,
    settle,
    wait_online,
)
from peers import PEERS, WORKING_SET_MIB, Peer, Store
from workloads import WORKLOADS, Workload

# A single larger request would turn zero copy off in bdevperf, for good.
FILL_IO_SIZE = 64 << 10
GC_PERCENT = 90
# Amounts of cached data, and the share of the cache that they may be: less than GC_PERCENT.
SIZES_GIB = (1, 4, 12)
SIZE_CACHE_SHARE = 0.86
# Of a workload that only writes, to a cache that is to have room for all of it: 40 GiB a second fill 7/8.
BRIEF_SECONDS_PER_MIB = 0.35 / peers.CACHE_MIB_WANTED
BRIEF_SECONDS_LEAST = 0.1
# Of each kind of bare copies.
COPY_SECONDS = 0.4
# Of each part of a write.
COST_SECONDS = 0.2
# The scenes that take long do with fewer rounds.
LONG_SCENE_ROUNDS = 3
# What write-back asks a base for, when the log is sequential, and how much it has under way.
WRITEBACK_IO_SIZE = 1 << 20
WRITEBACK_DEPTH = 32
# So many that their buffers do not stay in the caches of a CPU: what is written back lies in memory, too.
UNCACHED_DEPTH = 512
# A drain takes less than a second.
DRAIN_PAUSE_S = 0.001
# A cache of its own for a backlog.
DIRECT_CACHE_MIB = 1536
# What a base takes that keeps a core half busy at the most, MiB in a second.
LIMITED_MIBPS = 2000
# Who gets a FLUSH behind every write or two, and the order of write-back.
FLUSHES = (("aio", None), ("pcache_strict", "strict"), ("pcache_relaxed", "relaxed"))
FLUSHES_SECONDS = 3
# Bytes of a key, and how many millions of them a recovery is measured with.
RECOVERY_KEYS = ((512, 1), (512, 4), (512, 12), (4096, 1), (4096, 2))
# So much of the cache is needed for each: payload, a share of a kset, and room, to stay below half of it.
CACHE_BYTES_FOR_KEY = {512: 600 * 3, 4096: 4200 * 2}
# What the log says at its end.
_RECOVERED = re.compile(r"recovered (\d+) keys from \d+ segments in (\d+) ms on (\d+) cores")
_FAILURES = (AppFailed, RpcError, RpcConnectionLost, native.NativeFailed, TimeoutError, OSError)


class Bench:
    """The scenes; what they find out ends up in `figures`."""

    def __init__(
        self, host: Host, store: Store, *, cache_mib: int, seconds: int, only: re.Pattern[str]
    ) -> None:
        self.host = host
        self.store = store
        self.cache_mib = cache_mib
        self.seconds = seconds
        self.only = only
        self.figures = Figures()
        self.machine: dict[str, Any] = {}
        self.parts = native.Parts()
        self.perf = native.Perf()
        self.counts_with_perf = self.perf.works
        brief_seconds = BRIEF_SECONDS_PER_MIB * cache_mib
        self.brief_seconds = min(max(brief_seconds, BRIEF_SECONDS_LEAST), seconds)
        folder = ROOT / "target/bench"
        folder.mkdir(parents=True, exist_ok=True)
        self._noise = build_preload("noise", folder)
        self._started_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self._started_s:6.1f} s] {text}", flush=True)

    def wanted(self, workload: str, peer: str) -> bool:
        """Does BENCH_ONLY take it?"""
        return self.only.search(f"{workload}/{peer}") is not None

    def round(self, number: int) -> None:
        """Everything once, the peers in turn."""
        self._scene("copy limit", self.copy_limit)
        self._scene("parts of a write", self.costs)
        for peer in PEERS:
            self._scene(peer.name, lambda peer=peer: self.peer(peer))
        if number < LONG_SCENE_ROUNDS:
            for size_gib in SIZES_GIB:
                self._scene(f"{size_gib} GiB cached", lambda size_gib=size_gib: self.size(size_gib))
            self._scene("recovery", self.recovery)
            self._scene("backlog", self.backlog)
            self._scene("flushes", self.flushes)
        if number == 0:
            self._scene("memory of the index", self.index)
            self._scene("instructions", self.instructions)

    def _scene(self, name: str, run: Callable[[], None]) -> None:
        started_s = time.monotonic()
        try:
            run()
        except _FAILURES as error:
            self.figures.failed[name] = str(error)
            self.say(f"{name}: FAILED: {error}")
        finally:
            self.host.forget_ended()
            self._note_small_pages()
        took_s = time.monotonic() - started_s
        if took_s > 0.1:
            self.say(f"{name}: {took_s:.1f} s")

    def _note_small_pages(self) -> None:
        made_mib, huge_mib = self.store.made_mib(), self.store.huge_mib()
        if huge_mib < made_mib:
            self._note("small pages", f"of a cache of {made_mib} MiB only {huge_mib} MiB lay on huge pages")

    # ---- peers --------------------------------------------------------------------------------

    def peer(self, peer: Peer) -> None:
        """All workloads of one peer."""
        workloads = [w for w in WORKLOADS if peer.name in w.peers and self.wanted(w.name, peer.name)]
        if not workloads:
            return
        if peer.small_cache:
            bdevs = peer.make(self.store.small_file, peers.SMALL_CACHE_MIB)
        else:
            bdevs = peer.make(self.store.cache_file, self.cache_mib)
        options: dict[str, Any] = {"cores": peer.cores, "zero_copy": peer.zero_copy}
        options["zipf_theta"] = peer.zipf_theta
        if peer.region_mib:
            # One workload: that of the jobs.
            (workload,) = workloads
            options["jobs_file"] = self.store.folder / "jobs.conf"
            options["jobs_file"].write_text(peers.jobs_in_region(peer.cores, peer.region_mib, workload))
        for run in _runs(peer, workloads):
            with self._bdevperf(bdevs, **options) as bdevperf:
                if peer.zero_copy and not self._has_zero_copy(bdevperf.app.rpc):
                    self._skip(peer.name, "the bdev does not support ZCOPY")
                    return
                if peer.filled:
                    self.fill(bdevperf, WORKING_SET_MIB)
                for workload in run:
                    if peer.has_room:
                        self._make_room(bdevperf, workload)
                    briefly = _is_brief(peer, workload)
                    self.measure(bdevperf, workload, peer.name, cores=peer.cores, briefly=briefly)
        self.store.small_file.unlink(missing_ok=True)

    @contextmanager
    def _bdevperf(self, bdevs: peers.Bdevs, **options: Any) -> Iterator[Bdevperf]:
        if self.host.hugepages.free_mib() < peers.APP_MIB:
            self._note("hugepages", "too few were free, some applications ran with 4 KiB pages")
        bdevperf = Bdevperf(self.host, bdevs, before_module=self._noise, **options)
        yield bdevperf
        log = bdevperf.app.log()
        if "Running I/O" in log and "noise: the buffers" not in log:
            self._note("data", "zeroes: the buffers of bdevperf could not be filled with noise")
        bdevperf.stop()

    def _has_zero_copy(self, rpc: Rpc) -> bool:
        bdevs = [bdev for bdev in rpc.bdev_get_bdevs() if not bdev["claimed"]]
        return all(bdev["supported_io_types"]["zcopy"] for bdev in bdevs)

    def fill(self, bdevperf: Bdevperf, size_mib: int) -> None:
        """Writes everything once."""
        seconds = 1
        while True:
            result = bdevperf.run("write", io_size=FILL_IO_SIZE, queue_depth=8, seconds=seconds)
            # Each core writes its own part.
            if result.mibps * seconds >= size_mib * 1.1:
                return
            seconds = math.ceil(1.3 * size_mib / max(result.mibps, 1.0)) + 1

    def _make_room(self, bdevperf: Bdevperf, workload: Workload) -> None:
        """Nothing is dirty and, before writes, the log is empty."""
        rpc = bdevperf.app.rpc
        drain(rpc)
        if not workload.writes:
            return
        rpc.bdev_pcache_set_options(name=CACHE, gc_percent=0)
        settle(rpc)
        rpc.bdev_pcache_set_options(name=CACHE, gc_percent=GC_PERCENT)
        if workload.read_percent:
            self.fill(bdevperf, WORKING_SET_MIB)
            drain(rpc)

    def measure(
        self,
        bdevperf: Bdevperf,
        workload: Workload,
        peer: str,
        *,
        cores: int = 1,
        briefly: bool = False,
    ) -> None:
        """One run, with what the cache itself says about it; a brief one ends the application."""
        rpc = bdevperf.app.rpc
        cached = cache_info(rpc) is not None
        if cached:
            rpc.bdev_pcache_reset_stats(name=CACHE)
        seconds = self.brief_seconds if briefly else float(self.seconds)
        if self.counts_with_perf:
            self.perf.start(bdevperf.app.process.pid, min(seconds, 1.0))
        stats: dict[str, int] = {}
        if briefly:
            result = bdevperf.run_and_end(
                workload.kind,
                io_size=workload.io_size,
                queue_depth=workload.depth,
                seconds=seconds,
                at_end=lambda: stats.update(cache_stats(rpc)),
            )
        else:
            result = self._run(bdevperf, workload)
            if cached:
                stats = cache_stats(rpc)
        metrics = {
            "iops": result.iops,
            "mibps": result.mibps,
            "latency_us": result.latency_us,
            "latency_us_median": result.latency_us_median,
            "latency_us_p99": result.latency_us_p99,
            "latency_us_p999": result.latency_us_p999,
            "latency_us_p9999": result.latency_us_p9999,
            "latency_us_max": result.latency_us_max,
        }
        if self.counts_with_perf:
            metrics["instructions_per_io"] = self.perf.rate() * cores / result.iops
        if cached:
            metrics |= _shares(stats)
        self.figures.add(workload.name, peer, **metrics)

    def _run(self, bdevperf: Bdevperf, workload: Workload) -> WorkloadResult:
        return bdevperf.run(
            workload.kind,
            io_size=workload.io_size,
            queue_depth=workload.depth,
            seconds=self.seconds,
            read_percent=workload.read_percent,
        )

    # ---- scenes of their own ------------------------------------------------------------------

    def size(self, size_gib: int) -> None:
        """Random reads and writes with so much cached data; the same cache for all amounts."""
        name = f"{size_gib}g"
        read, write = (
            Workload(f"size_{kind}_qd32", kind, 4096, 32, (name,)) for kind in ("randread", "randwrite")
        )
        if not (self.wanted(read.name, name) or self.wanted(write.name, name)):
            return
        size_mib = size_gib << 10
        if size_mib > self.cache_mib * SIZE_CACHE_SHARE:
            self._skip(f"size {name}", f"a cache of {self.cache_mib} MiB cannot hold it")
            return
        bdevs = [peers.null("Base", size_mib), peers.pcache(self.store.cache_file, self.cache_mib)]
        with self._bdevperf(bdevs) as bdevperf:
            self.fill(bdevperf, size_mib)
            drain(bdevperf.app.rpc)
            self.measure(bdevperf, read, name)
            # Until the log has gone around once: then write-back and reclaim run at all sizes alike.
            rate = self._run(bdevperf, write).mibps
            around_s = math.ceil(self.cache_mib / max(rate, 1.0))
            bdevperf.run("randwrite", io_size=4096, queue_depth=32, seconds=around_s)
            self.measure(bdevperf, write, name)

    def recovery(self) -> None:
        """How long it takes to find millions of keys, on one core and on two; and how that grows."""
        if self.wanted("recovery", "cores"):
            base = self.store.folder / "base.img"
            try:
                self._recovery(base)
            finally:
                base.unlink(missing_ok=True)
        if self.wanted("recovery_engine", "keys"):
            for key_bytes, millions in RECOVERY_KEYS:
                self._recover_engine(key_bytes, millions)

    def _recover_engine(self, key_bytes: int, millions: int) -> None:
        name = f"{millions}m" if key_bytes == 512 else f"{millions}m_4k"
        file, size_mib, count = self.store.cache_file, self.cache_mib, millions * 1_000_000
        if count * CACHE_BYTES_FOR_KEY[key_bytes] > size_mib * MIB:
            self._skip(
                f"recovery of {millions} M keys of {key_bytes} bytes", "the cache is too small for them"
            )
            return
        answer = self.parts.run("recover", file, size_mib, count, key_bytes)
        self.figures.add("recovery_engine", name, **answer)

    def _recovery(self, base: Path) -> None:
        # The base must hold what is written back: the cache recognises it by that.
        with base.open("wb") as file:
            file.truncate(WORKING_SET_MIB * MIB)
        aio = [peers.entry("bdev_aio_create", name="Base", filename=str(base), block_size=512)]
        with self._bdevperf([*aio, peers.pcache(self.store.cache_file, self.cache_mib)]) as bdevperf:
            # Small, so that there are many keys.
            bdevperf.run("randwrite", io_size=512, queue_depth=32, seconds=1)
        reopened = peers.pcache(self.store.cache_file, self.cache_mib, format="never")
        for cores in (1, 2):
            with self._bdevperf([*aio, reopened], cores=cores) as bdevperf:
                wait_until(lambda rpc=bdevperf.app.rpc: bdev_info(rpc, CACHE), "the cache is there")
                told = _RECOVERED.search(bdevperf.app.log())
            if told is None:
                raise AppFailed("the log does not tell of a recovery")
            keys, took_ms, worker_count = (int(number) for number in told.groups())
            if worker_count != cores:
                raise AppFailed(f"{worker_count} workers recovered on {cores} cores")
            rate = keys / max(took_ms, 1) / 1e3
            self.figures.add(
                "recovery",
                f"{cores}core" if cores == 1 else f"{cores}cores",
                keys=keys,
                ms=took_ms,
                ms_per_million_keys=took_ms / keys * 1e6,
                million_keys_per_s=rate,
                million_keys_per_s_per_core=rate / cores,
            )

    def backlog(self) -> None:
        """How fast dirty data reach a RAM disk when nobody else wants the core."""
        for name, depth in (("malloc", UNCACHED_DEPTH), ("malloc_cached", WRITEBACK_DEPTH)):
            if self.wanted("backlog", name):
                with self._bdevperf([peers.malloc("Base", WORKING_SET_MIB)]) as bdevperf:
                    self.fill(bdevperf, WORKING_SET_MIB)
                    result = bdevperf.run(
                        "write", io_size=WRITEBACK_IO_SIZE, queue_depth=depth, seconds=self.seconds
                    )
                self.figures.add("backlog", name, mibps=result.mibps)
        if self.wanted("backlog", "pcache"):
            self._backlog("pcache", self.store.cache_file, self.cache_mib)
        if self.wanted("backlog", "pcache_direct"):
            # Memory that a base with DMA may look at too, as that of a device-DAX.
            with self.host.hugepages.more(DIRECT_CACHE_MIB) as folder:
                if folder is None:
                    self._skip("backlog of a cache on hugetlbfs", "too few hugepages can be reserved")
                    return
                file = folder / "pcache-bench-direct"
                try:
                    self._backlog("pcache_direct", file, DIRECT_CACHE_MIB, **peers.LATE_WRITEBACK)
                finally:
                    file.unlink(missing_ok=True)

        if self.wanted("backlog", "pcache_limited"):
            # A base that is the limit itself, and not the core that copies to it.
            with self._bdevperf([peers.malloc("Base", WORKING_SET_MIB)]) as bdevperf:
                _limit_base(bdevperf.app.rpc)
                result = bdevperf.run("write", io_size=128 << 10, queue_depth=8, seconds=self.seconds)
            self.figures.add("backlog", "limited_base", mibps=result.mibps)
            self._backlog("pcache_limited", self.store.cache_file, self.cache_mib, limit=_limit_base)

    def _backlog(
        self,
        name: str,
        file: Path,
        size_mib: int,
        *,
        limit: Callable[[Rpc], None] = lambda _: None,
        **settings: Any,
    ) -> None:
        bdevs = [peers.malloc("Base", WORKING_SET_MIB), peers.pcache(file, size_mib, **settings)]
        with self._bdevperf(bdevs) as bdevperf:
            rpc = bdevperf.app.rpc
            # Twice, so that the base's pages are not touched for the first time.
            for is_last in (False, True):
                # Of nothing.
                calls_s = _drain_s(rpc)
                self.fill(bdevperf, WORKING_SET_MIB)
                if is_last:
                    limit(rpc)
                rpc.bdev_pcache_reset_stats(name=CACHE)
                took_s = _drain_s(rpc) - calls_s
                written_mib = cache_stats(rpc)["bytes.core_volume_wr"] / MIB
        self.figures.add("backlog", name, mibps=written_mib / took_s, written_mib=written_mib)

    def flushes(self) -> None:
        """A FLUSH behind every write or two: a file with and without a cache in front that is soon full."""
        for name, order in FLUSHES:
            if self.wanted("flushes", name):
                try:
                    self._flushes(name, order)
                finally:
                    self.store.small_file.unlink(missing_ok=True)

    def _flushes(self, name: str, order: str | None) -> None:
        # On a disk: in memory a flush costs nothing.
        with tempfile.TemporaryDirectory(prefix="pcache-bench-", dir=ROOT / "target") as folder:
            storage = Storage(Path(folder), block_size=4096, options={"writeback_order": order})
            client = storage.client()
            cache = [storage.cache(cache_path=str(self.store.small_file))] if order else []
            app = self.host.start("nvmf_tgt", bdevs=[storage.aio_base(), *cache])
            if order:
                wait_online(app.rpc)
            result = client.write(
                NvmfTarget(app, CACHE if order else BASE).url,
                seconds=FLUSHES_SECONDS,
                depth=1,
                io_bytes="4096:4096",
                read_percent=0,
                unmap_percent=0,
                flush_percent=50,
            )
            if result.exit_code != EXIT_DONE:
                raise AppFailed(f"the client ended with {result.exit_code}:\n{result.complaints}")
            summary = result.summary
            self.figures.add("flushes", name, writes_per_s=summary["writes_acked"] / summary["seconds"])
            app.stop()

    def copy_limit(self) -> None:
        """How fast the store instructions alone fill the cache's memory."""
        if not self.wanted("copy", "limit"):
            return
        answer = self.parts.run("copy", self.store.cache_file, self.cache_mib, COPY_SECONDS)
        self.machine["store_kernel"] = answer.pop("store_kernel")
        self.machine["store_durability"] = answer.pop("durability")
        self.figures.add("copy", "limit", **answer)

    def costs(self) -> None:
        """What the parts of a write cost; the bdev layer is that of the null bdev."""
        if not self.wanted("costs", "parts"):
            return
        answer = self.parts.run("costs", self.store.cache_file, self.cache_mib, COST_SECONDS)
        for depth, parts in answer.items():
            self.figures.add("costs", depth, **parts)

    def index(self) -> None:
        """DRAM for what is cached."""
        if not self.wanted("index", "dram"):
            return
        for kind in ("dense", "scattered", "scattered_512"):
            self.figures.add("index", kind, **self.parts.index(self.store.small_file, kind))

    def instructions(self) -> None:
        """Of the engine alone; those of bdevperf are counted with the workloads, where perf can."""
        if not self.wanted("instructions", "engine"):
            return
        if not self.counts_with_perf:
            self._skip("instructions of bdevperf", "this machine lets perf count none")
        if not native.have_valgrind():
            self._skip("instructions of the engine", "valgrind is not installed")
            return
        for kind, depth in (("write", 1), ("write", 32), ("write_busy", 32), ("write_128k", 8), ("read", 1)):
            count = self.parts.instructions(self.store.small_file, kind, depth)
            self.figures.add("instructions", f"engine_{kind}_qd{depth}", instructions_per_io=count)

    def _skip(self, what: str, why: str) -> None:
        self._note(what, f"left out: {why}")

    def _note(self, what: str, text: str) -> None:
        if what not in self.figures.notes:
            self.say(f"{what}: {text}")
        self.figures.notes[what] = text


def _is_brief(peer: Peer, workload: Workload) -> bool:
    """Would a second of it write more than the cache has room for?"""
    return peer.has_room and workload.writes and not workload.read_percent


def _runs(peer: Peer, workloads: list[Workload]) -> list[list[Workload]]:
    """What has a bdevperf of its own: each that is brief, and all others together."""
    briefly = [[workload] for workload in workloads if _is_brief(peer, workload)]
    at_length = [workload for workload in workloads if not _is_brief(peer, workload)]
    return [*([at_length] if at_length else []), *briefly]


def _shares(stats: dict[str, int]) -> dict[str, float]:
    """Is a hit a hit, and how much was written back meanwhile?"""
    shares: dict[str, float] = {}
    if stats["requests.rd_total"]:
        shares["hit_share"] = stats["requests.rd_hits"] / stats["requests.rd_total"]
    if stats["bytes.volume_wr"]:
        shares["writeback_share"] = stats["bytes.core_volume_wr"] / stats["bytes.volume_wr"]
        shares["copied_share"] = stats["gc.copied_bytes"] / stats["bytes.volume_wr"]
        shares["segments_reclaimed"] = stats["gc.segments_reclaimed"]
    return shares


def _drain_s(rpc: Rpc) -> float:
    started_s = time.monotonic()
    drain(rpc, pause_s=DRAIN_PAUSE_S)
    return time.monotonic() - started_s


def _limit_base(rpc: Rpc) -> None:
    rpc.bdev_set_qos_limit(name="Base", w_mbytes_per_sec=LIMITED_MIBPS)
