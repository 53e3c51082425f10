# SPDX-License-Identifier: BSD-3-Clause
"""Several caches on one cache device, each in a part of its own."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, AckClient, App, Host, IscsiTarget, wait_until
from harness.scenario import (
    MIB,
    Storage,
    assert_intact,
    cache_info,
    cache_stats,
    digest,
    drain,
    error_of,
    wait_online,
)

PART_MIB = 32
DEVICE_MIB = 80


class Parts:
    """Two caches on one file, each with a base, a client and a part of its own; the rest is nobody's."""

    def __init__(self, media: Path, seed: int) -> None:
        self.device = media / "device.pmem"
        with self.device.open("wb") as file:
            file.write(b"\xa5" * (DEVICE_MIB * MIB))
            for number in (0, 1):
                file.seek(self.offset_mib(number) * MIB)
                file.write(bytes(PART_MIB * MIB))
        self.storages = [Storage(media / str(number), base_mib=48) for number in (0, 1)]
        self.clients: list[AckClient] = []
        for number, storage in enumerate(self.storages):
            storage.folder.mkdir()
            self.clients.append(storage.client(seed + number))

    @staticmethod
    def offset_mib(number: int) -> int:
        return 8 + number * (PART_MIB + 8)

    def params(self, number: int, **overrides: Any) -> dict[str, Any]:
        return self.storages[number].cache_params(
            f"Base{number}",
            **{
                "name": f"Cache{number}",
                "cache_path": str(self.device),
                "cache_offset_mib": self.offset_mib(number),
                "cache_size_mib": PART_MIB,
                **overrides,
            },
        )

    def bdevs(self, number: int, **overrides: Any) -> list[dict[str, Any]]:
        cache = {"method": "bdev_pcache_create", "params": self.params(number, **overrides)}
        return [self.storages[number].aio_base(f"Base{number}"), cache]

    def export(self, app: App, number: int) -> str:
        wait_online(app.rpc, f"Cache{number}")
        return IscsiTarget(app, f"Cache{number}", number=number + 1).url

    def outside(self) -> list[bytes]:
        """What lies outside of both parts."""
        data = self.device.read_bytes()
        ends = [0, *(at * MIB for number in (0, 1) for at in self.span(number)), DEVICE_MIB * MIB]
        return [data[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True)]

    def span(self, number: int) -> tuple[int, int]:
        return self.offset_mib(number), self.offset_mib(number) + PART_MIB


def test_two_caches_of_one_process_are_killed_with_both_dirty(
    host: Host, media: Path, seed: int, ended_client: list[AckClient]
):
    parts = Parts(media, seed)
    ended_client.extend(parts.clients)
    before = parts.outside()
    bdevs = parts.bdevs(0) + parts.bdevs(1)
    for _ in range(2):
        app = host.start("spdk_tgt", bdevs=bdevs, cores=2)
        urls = [parts.export(app, number) for number in (0, 1)]
        for client, url in zip(parts.clients, urls, strict=True):
            assert_intact(client.verify(url))
            client.start_writing(url, seconds=60)
        time.sleep(1.5)
        for number in (0, 1):
            # More than there is room for: each has gone round within its part.
            assert cache_stats(app.rpc, f"Cache{number}")["gc.segments_reclaimed"] > 0
            assert cache_info(app.rpc, f"Cache{number}")["dirty_bytes"] > 0
        app.kill()
        for client in parts.clients:
            client.finish_writing()
    app = host.start("spdk_tgt", bdevs=bdevs)
    for number, client in enumerate(parts.clients):
        assert_intact(client.verify(parts.export(app, number)))
        drain(app.rpc, f"Cache{number}")
    for number in (0, 1):
        app.rpc.bdev_pcache_delete(name=f"Cache{number}")
        assert_intact(parts.clients[number].verify_file(parts.storages[number].base_file))
    app.stop()
    assert parts.outside() == before


def test_a_cache_of_another_process_is_killed_and_recovered_beside_one_that_works(
    host: Host, media: Path, seed: int, ended_client: list[AckClient]
):
    parts = Parts(media, seed)
    ended_client.extend(parts.clients)
    first = host.start("spdk_tgt", bdevs=parts.bdevs(0))
    second = host.start("spdk_tgt", bdevs=parts.bdevs(1), first_core=1)
    urls = [parts.export(first, 0), parts.export(second, 1)]
    for client, url in zip(parts.clients, urls, strict=True):
        client.start_writing(url, seconds=60)
    time.sleep(1)
    second.kill()
    parts.clients[1].finish_writing()
    acked = parts.clients[0].writes_acked()
    second = host.start("spdk_tgt", bdevs=parts.bdevs(1), first_core=1)
    assert_intact(parts.clients[1].verify(parts.export(second, 1)))
    wait_until(lambda: parts.clients[0].writes_acked() > acked, "the other one goes on")
    first.kill()
    parts.clients[0].finish_writing()
    second.stop()
    first = host.start("spdk_tgt", bdevs=parts.bdevs(0))
    assert_intact(parts.clients[0].verify(parts.export(first, 0)))
    first.stop()


def test_what_overlaps_is_refused_with_both_ranges(host: Host, media: Path, seed: int):
    parts = Parts(media, seed)
    app = host.start("spdk_tgt", bdevs=[*parts.bdevs(0), parts.storages[1].aio_base("Base1")])
    wait_online(app.rpc, "Cache0")
    other = host.start("spdk_tgt", bdevs=[parts.storages[1].aio_base("Base1")], first_core=1)
    before = digest(parts.device)
    last = parts.span(0)[1]
    for overrides, wanted in (
        ({"cache_offset_mib": last - 2}, f"MiB {last - 2} to {last - 2 + PART_MIB}"),
        ({"cache_offset_mib": 0, "cache_size_mib": DEVICE_MIB}, f"MiB 0 to {DEVICE_MIB}"),
        ({"cache_offset_mib": None, "cache_size_mib": None}, "all of it"),
    ):
        taken = f"{wanted} is wanted, MiB {parts.span(0)[0]} to {last} is taken"
        # By another cache of the same process, and by one of another process.
        error = error_of(app.rpc.bdev_pcache_create, **parts.params(1, **overrides))
        assert error.code == -17
        assert taken in error.message
        error = error_of(other.rpc.bdev_pcache_create, **parts.params(1, **overrides))
        assert error.code == -16
        assert taken in error.message
        assert f"process {app.process.pid}" in error.message
    # The same by another name of the file is found out by the lock.
    link = media / "link"
    link.symlink_to(parts.device)
    error = error_of(app.rpc.bdev_pcache_create, **parts.params(1, cache_path=str(link), cache_offset_mib=8))
    assert error.code == -16
    assert digest(parts.device) == before
    # Side by side they fit.
    assert app.rpc.bdev_pcache_create(**parts.params(1, cache_path=str(link))) == "Cache1"
    app.stop()
    other.stop()


def test_a_part_is_refused_with_what_would_be_right(host: Host, media: Path, seed: int):
    parts = Parts(media, seed)
    app = host.start("spdk_tgt", bdevs=[parts.storages[0].aio_base("Base0")])
    before = digest(parts.device)
    for overrides, code, said in (
        ({"cache_size_mib": None}, -32602, "cache_size_mib is missing"),
        ({"cache_offset_mib": 9}, -32602, "cache_offset_mib is 9"),
        ({"cache_size_mib": 31}, -32602, "cache_size_mib is 31"),
        ({"cache_offset_mib": DEVICE_MIB - 8}, -22, f"{DEVICE_MIB * MIB} usable bytes"),
        ({"cache_path": str(media / "none")}, -2, "truncate -s"),
        # It begins with what is nobody's.
        ({"cache_offset_mib": 6}, -17, "neither blank nor a cache"),
    ):
        error = error_of(app.rpc.bdev_pcache_create, **parts.params(0, **overrides))
        assert error.code == code, error
        assert said in error.message, error
    assert not (media / "none").exists()
    assert digest(parts.device) == before
    app.stop()


def test_configurations_and_tools_know_of_parts(host: Host, media: Path, seed: int):
    parts = Parts(media, seed)
    app = host.start("spdk_tgt", bdevs=parts.bdevs(0) + parts.bdevs(1))
    for number in (0, 1):
        assert_intact(parts.clients[number].write(parts.export(app, number), seconds=1))
        assert cache_info(app.rpc, f"Cache{number}")["cache_offset_mib"] == parts.offset_mib(number)
    saved = app.rpc.call("framework_get_config", {"name": "bdev"})
    caches = [entry for entry in saved if entry["method"] == "bdev_pcache_create"]
    assert [c["params"]["cache_offset_mib"] for c in caches] == [parts.offset_mib(n) for n in (0, 1)]
    assert [c["params"]["cache_size_mib"] for c in caches] == [PART_MIB, PART_MIB]
    app.stop()
    for number in (0, 1):
        info = inspect("info", parts, number)
        assert info["base"]["name"] == f"Base{number}"
    bases = [parts.storages[number].aio_base(f"Base{number}") for number in (0, 1)]
    app = host.start("spdk_tgt", bdevs=bases + caches)
    for number in (0, 1):
        assert_intact(parts.clients[number].verify(parts.export(app, number)))
    app.stop()


def inspect(command: str, parts: Parts, number: int) -> dict[str, Any]:
    """What pcache-inspect says of a part, if it was built."""
    tool = ROOT / "target/pcache/pcache-inspect"
    if not tool.exists():
        pytest.skip("run 'make inspect' first")
    done = subprocess.run(
        [
            tool,
            command,
            parts.device,
            f"--cache-offset-mib={parts.offset_mib(number)}",
            f"--cache-size-mib={PART_MIB}",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)
