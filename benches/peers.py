# SPDX-License-Identifier: BSD-3-Clause
"""What is compared: each peer is a set of bdevs, and all that its process has."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.memory import meminfo_mib
from harness.scenario import CACHE, MIB
from workloads import Workload

# What the workloads go to. Far more than the caches of a processor hold.
WORKING_SET_MIB = 1024
# Of the cache, unless the machine has less: room for what a brief workload of writes appends to the log,
# so that write-back has no cause to run meanwhile.
CACHE_MIB_WANTED = 16 << 10
# Everything that is read fits.
CACHE_MIB_LEAST = 2 * WORKING_SET_MIB
# A cache of half the working set has to write back and reclaim all the time.
SMALL_CACHE_MIB = WORKING_SET_MIB // 2
# Of one bdevperf: two malloc bdevs for OCF, its metadata, the buffers.
APP_MIB = WORKING_SET_MIB * 9 // 4 + 512
# Must stay free.
_SPARE_MIB = 2048
# As slow as a good NVMe device.
DELAY_US = 80
_TERABYTE_MIB = 1 << 20
_CLONE_NEWNS = 0x20000
# Of st_blocks.
_SECTOR_BYTES = 512
# Of a cache: nothing is written back while there is room, unless it is asked for.
LATE_WRITEBACK = {"dirty_high_percent": 95, "dirty_low_percent": 94}

Bdevs = list[dict[str, Any]]


class Store:
    """A folder in memory with huge pages, as a DAX mapping of persistent memory has them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pcache-bench-", dir="/dev/shm"))
        mount = ["mount", "-t", "tmpfs", "-o", "huge=always,size=95%", "none", str(self.folder)]
        self._mounted = _leave_mounts_to_others() and _succeeds(mount)
        self.kind = "tmpfs with huge pages" if self._mounted else "tmpfs"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        if self._mounted:
            subprocess.run(["umount", str(self.folder)], check=True)
        self.folder.rmdir()

    @property
    def cache_file(self) -> Path:
        """The large cache; kept from one peer to the next, so that its pages are made once."""
        return self.folder / "cache.pmem"

    @property
    def small_file(self) -> Path:
        """For everything that makes a file of its own; removed after use."""
        return self.folder / "small.pmem"

    def made_mib(self) -> int:
        """What the large cache takes of the memory by now."""
        return self.cache_file.stat().st_blocks * _SECTOR_BYTES // MIB if self.cache_file.exists() else 0

    def huge_mib(self) -> int:
        """How much of it can lie on huge pages: so much does of all that is in a tmpfs."""
        return meminfo_mib("ShmemHugePages") if self._mounted else self.made_mib()

    def cache_mib(self, wanted_mib: int) -> int:
        """How large the cache can be: whole GiB, 0 if there is too little memory even for the least."""
        room_mib = meminfo_mib("MemAvailable") + self.made_mib() - _SPARE_MIB - SMALL_CACHE_MIB
        fits_mib = min(wanted_mib, room_mib) >> 10 << 10
        return fits_mib if fits_mib >= CACHE_MIB_LEAST else 0


def _leave_mounts_to_others() -> bool:
    """What this process mounts from now on, only it and its children see, and it goes when they end: a run
    that is killed must not leave gigabytes behind."""
    own_namespace = ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0
    return own_namespace and _succeeds(["mount", "--make-rprivate", "/"])


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def entry(method: str, **params: Any) -> dict[str, Any]:
    """An entry of a configuration file."""
    return {"method": method, "params": params}


def malloc(name: str, size_mib: int, block_size: int = 4096) -> dict[str, Any]:
    """A RAM disk."""
    blocks = size_mib * MIB // block_size
    return entry("bdev_malloc_create", name=name, num_blocks=blocks, block_size=block_size)


def null(name: str, size_mib: int, block_size: int = 4096) -> dict[str, Any]:
    """A device that does nothing, so that it takes no time of the core: as one with DMA of its own."""
    blocks = size_mib * MIB // block_size
    return entry("bdev_null_create", name=name, num_blocks=blocks, block_size=block_size)


def delay(name: str, base: str) -> dict[str, Any]:
    """Makes every request last."""
    latencies = {
        f"{which}_{what}_latency": DELAY_US for which in ("avg", "p99") for what in ("read", "write")
    }
    return entry("bdev_delay_create", name=name, base_bdev_name=base, **latencies)


def pcache(file: Path, size_mib: int, **options: Any) -> dict[str, Any]:
    """A new cache in front of the bdev Base."""
    params = {"base_bdev_name": "Base", "cache_path": str(file), "cache_size_mib": size_mib}
    # Segments are reclaimed as late as possible: the working set and a workload of writes find room.
    params |= {"format": "force", "gc_percent": 90, **options}
    return entry("bdev_pcache_create", name=CACHE, **params)


def jobs_in_region(cores: int, region_mib: int, workload: Workload) -> str:
    """Jobs for bdevperf: one on each core, all on the same first MiB of the cache."""
    lines = []
    for core in range(cores):
        lines += [f"[core{core}]", f"filename={CACHE}", f"cpumask={1 << core:#x}", f"rw={workload.kind}"]
        lines += [f"bs={workload.io_size}", f"iodepth={workload.depth}"]
        # In blocks.
        lines += ["offset=0", f"length={region_mib * MIB // 4096}", ""]
    return "\n".join(lines)


def _passthru() -> Bdevs:
    return [
        null("Base", WORKING_SET_MIB),
        entry("bdev_passthru_create", name="Passthru", base_bdev_name="Base"),
    ]


def _ocf() -> Bdevs:
    names = {"name": "Ocf", "cache_bdev_name": "OcfCache", "core_bdev_name": "Base"}
    # Its metadata lies on the cache device too.
    cache = malloc("OcfCache", WORKING_SET_MIB * 5 // 4)
    return [
        null("Base", WORKING_SET_MIB),
        cache,
        entry("bdev_ocf_create", mode="wb", cache_line_size=4, **names),
    ]


@dataclass(frozen=True)
class Peer:
    """`make` gets the file and the size of a cache."""

    name: str
    make: Callable[[Path, int], Bdevs]
    cores: int = 1
    zero_copy: bool = False
    # Everything is written once before, so that reads hit and no page is touched for the first time.
    filled: bool = True
    small_cache: bool = False
    # Random addresses follow Zipf's law, in the part of each core.
    zipf_theta: float = 0
    # All cores work on the same first MiB of the bdev; 0: each on its own part.
    region_mib: int = 0

    @property
    def has_room(self) -> bool:
        """Is there a cache of ours in it that need not write back meanwhile?"""
        return self.name.startswith("pcache") and not self.small_cache


def _alone(*bdevs: dict[str, Any]) -> Callable[[Path, int], Bdevs]:
    return lambda _file, _size_mib: list(bdevs)


def _cached(*base: dict[str, Any], **options: Any) -> Callable[[Path, int], Bdevs]:
    return lambda file, size_mib: [*base, pcache(file, size_mib, **options)]


def _with_room(*base: dict[str, Any], **options: Any) -> Callable[[Path, int], Bdevs]:
    """Write-back does not begin within a brief workload of writes."""
    return _cached(*base, **LATE_WRITEBACK, **options)


_MALLOC = malloc("Base", WORKING_SET_MIB)
_NULL = null("Base", WORKING_SET_MIB)
_MALLOC_512 = malloc("Base", WORKING_SET_MIB, 512)
_NULL_512 = null("Base", WORKING_SET_MIB, 512)
# So large that no block is read twice.
_SLOW = [null("Null", _TERABYTE_MIB), delay("Base", "Null")]

# In the order in which they take their turns.
PEERS = [
    Peer("null", _alone(_NULL), filled=False),
    Peer("passthru", _alone(*_passthru()), filled=False),
    Peer("malloc", _alone(_MALLOC)),
    Peer("pcache", _with_room(_NULL)),
    Peer("ocf", _alone(*_ocf())),
    Peer("pcache_crc", _with_room(_NULL, data_crc=True)),
    Peer("malloc_zcopy", _alone(_MALLOC), zero_copy=True),
    Peer("pcache_zcopy", _with_room(_NULL), zero_copy=True),
    Peer("malloc_2cores", _alone(_MALLOC), cores=2),
    Peer("pcache_2cores", _with_room(_NULL), cores=2),
    Peer("pcache_2cores_skewed", _with_room(_NULL), cores=2, filled=False, region_mib=4),
    Peer("pcache_2cores_zipf", _with_room(_NULL), cores=2, zipf_theta=1.1),
    Peer("malloc_512", _alone(_MALLOC_512)),
    Peer("pcache_512", _with_room(_NULL_512)),
    Peer("pcache_busy", _cached(_NULL), small_cache=True),
    Peer("pcache_busy_malloc", _cached(_MALLOC), small_cache=True),
    Peer("slow", _alone(*_SLOW), filled=False),
    Peer("pcache_slow", _with_room(*_SLOW), filled=False),
]
