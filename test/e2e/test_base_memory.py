# SPDX-License-Identifier: BSD-3-Clause
"""How data get from the cache device to the base: by DMA only where devices can reach them."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import AckClient, App, Host, IscsiTarget
from harness.memory import join_free_memory
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    SICK,
    Session,
    Storage,
    assert_intact,
    cache_info,
    cache_stats,
    drain_and_verify,
    start_session,
    wait_online,
)

CPU = "written by the CPU, from the cache device"
DMA = "written by DMA, from the cache device"
BOUNCE = "written through 32 bounce buffers"
CACHE_MIB = 64


def addresses_are_told() -> bool:
    """Whether the system says where memory lies, which a device without an IOMMU has to know."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        here = ctypes.c_char.from_buffer(page)
        number = ctypes.addressof(here) // mmap.PAGESIZE
        del here
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(number * 8)
            entry = int.from_bytes(pagemap.read(8), "little")
    return entry & ((1 << 55) - 1) != 0


@pytest.fixture
def tmpfs_file(media: Path, host: Host) -> Iterator[Path]:
    """A file whose pages devices could reach, if only they stayed there: large ones, if there are any."""
    folder = media / "tmpfs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "huge=always", "none", str(folder)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    join_free_memory()
    yield folder / "cache.pmem"
    host.end_all()
    if is_mounted:
        subprocess.run(["umount", str(folder)], check=True)


def check_write_path(session: Session, client: AckClient, storage: Storage, path: str) -> None:
    """The cache says so, and what it writes back on this way is right."""
    info = cache_info(session.rpc)
    assert info is not None
    assert info["base_write_path"] == path
    written_before = cache_stats(session.rpc)["bytes.core_volume_wr"]
    assert_intact(client.write(session.url, seconds=2))
    drain_and_verify(session.rpc, client, storage)
    assert cache_stats(session.rpc)["bytes.core_volume_wr"] > written_before + MIB


def create(app: App, number: int, params: dict[str, Any]) -> Session:
    """Another cache in the place of the one that was deleted."""
    app.rpc.bdev_pcache_create(**params)
    wait_online(app.rpc)
    return Session(app, IscsiTarget(app, CACHE, number))


def test_devices_are_given_addresses_of_hugepages_alone(
    host: Host, media: Path, huge_file: Path, tmpfs_file: Path, seed: int
):
    if not addresses_are_told():
        pytest.skip("the system does not say where memory lies, which takes CAP_SYS_ADMIN")
    storage = Storage(media, cache_mib=CACHE_MIB)
    client = storage.client(seed)
    # The error bdev hands on what it is given, so it may be to a device.
    *base, _ = storage.sick_base()
    on_hugepages = {"cache_path": str(huge_file)}
    session = start_session(host, [*base, storage.cache(SICK, **on_hugepages)], pci=True)
    rpc = session.rpc
    check_write_path(session, client, storage, DMA)

    # What was registered is given back, and is registered again.
    rpc.bdev_pcache_delete(name=CACHE)
    session = create(session.app, 2, storage.cache_params(SICK, **on_hugepages))
    assert_intact(client.verify(session.url))
    check_write_path(session, client, storage, DMA)

    # Pages of other files can be moved while a device reads them.
    rpc.bdev_pcache_delete(name=CACHE)
    on_tmpfs = {"cache_path": str(tmpfs_file)}
    session = create(session.app, 3, storage.cache_params(SICK, **on_tmpfs))
    check_write_path(session, client, storage, BOUNCE)

    # A base that copies takes them wherever they are.
    rpc.bdev_pcache_delete(name=CACHE)
    rpc.bdev_error_delete(name=SICK)
    session = create(session.app, 4, storage.cache_params(BASE))
    check_write_path(session, client, storage, CPU)
    session.app.stop()


def test_hugepages_that_devices_cannot_reach_are_copied_from(
    host: Host, media: Path, huge_file: Path, seed: int
):
    storage = Storage(media, cache_mib=CACHE_MIB)
    client = storage.client(seed)
    *base, _ = storage.sick_base()
    # Without PCI SPDK translates no address for devices. It registers memory all the same.
    cache = storage.cache(SICK, cache_path=str(huge_file))
    session = start_session(host, [*base, cache], pci=False)
    check_write_path(session, client, storage, BOUNCE)
    session.app.stop()
