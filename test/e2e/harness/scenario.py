# SPDX-License-Identifier: BSD-3-Clause
"""A cache, its base, a client: what most tests are made of."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ackclient import AckClient, ClientResult
from .host import App, Host
from .rpc import Rpc, RpcError
from .targets import IscsiTarget, NvmfTarget
from .util import wait_until

MIB = 1 << 20

CACHE = "Cache0"
BASE = "Base0"
# bdev_error names its bdevs so.
SICK = f"EE_{BASE}"
FOR_EVER = 1 << 31
# A bdev_delay over the base, and the shortest time that it may take.
SLOW = "Slow0"
QUICK_US = 1


@dataclass
class Storage:
    """What is on the media: a base file, a cache file, and how they are opened.

    The defaults make a small cache of small segments, so that segments wrap, are written back and
    reclaimed within seconds.
    """

    folder: Path
    block_size: int = 512
    base_mib: int = 128
    cache_mib: int = 64
    options: dict[str, Any] = field(default_factory=lambda: {"segment_size_kib": 1024})

    @property
    def base_file(self) -> Path:
        """The file behind the base."""
        return self.folder / "base.img"

    @property
    def cache_file(self) -> Path:
        """The file that plays the persistent memory."""
        return self.folder / "cache.pmem"

    def aio_base(self, name: str = BASE) -> dict[str, Any]:
        """The base as a file: it survives the application."""
        params = {
            "name": name,
            "filename": str(self.base_file),
            "block_size": self.block_size,
            "fallocate": True,
        }
        return {"method": "bdev_aio_create", "params": params}

    def sick_base(self) -> list[dict[str, Any]]:
        """The base with the error bdev in front, and the cache."""
        error = {"method": "bdev_error_create", "params": {"base_name": BASE}}
        return [self.aio_base(), error, self.cache(SICK)]

    def slow_base(self) -> list[dict[str, Any]]:
        """The base with a bdev in front that takes as long as `set_latency` says."""
        kinds = ("avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency")
        slow = {"name": SLOW, "base_bdev_name": BASE, **dict.fromkeys(kinds, QUICK_US)}
        return [
            self.aio_base(),
            {"method": "bdev_delay_create", "params": slow},
            # Others look at a new bdev, and may have it open meanwhile.
            {"method": "bdev_wait_for_examine"},
        ]

    def malloc_base(self, name: str = BASE) -> dict[str, Any]:
        """The base as memory of the application: fast, and gone with it."""
        params = {
            "name": name,
            "num_blocks": self.base_mib * MIB // self.block_size,
            "block_size": self.block_size,
        }
        return {"method": "bdev_malloc_create", "params": params}

    def cache_params(self, base: str = BASE, **overrides: Any) -> dict[str, Any]:
        """The parameters of bdev_pcache_create. An override of None leaves a parameter out."""
        params = {
            "name": CACHE,
            "base_bdev_name": base,
            "cache_path": str(self.cache_file),
            "cache_size_mib": self.cache_mib,
            **self.options,
            **overrides,
        }
        return {name: value for name, value in params.items() if value is not None}

    def cache(self, base: str = BASE, **overrides: Any) -> dict[str, Any]:
        """The cache, as an entry of a configuration file."""
        return {"method": "bdev_pcache_create", "params": self.cache_params(base, **overrides)}

    def client(self, seed: int = 1, *, fill_base: bool = True) -> AckClient:
        """A client with a new journal, and a base file with content from before the cache."""
        client = AckClient(
            self.folder / "journal",
            block_size=self.block_size,
            block_count=self.base_mib * MIB // self.block_size,
            seed=seed,
        )
        client.create(self.base_file if fill_base else None)
        return client


@dataclass
class Session:
    """An spdk_tgt with the cache in it, exported."""

    app: App
    target: IscsiTarget | NvmfTarget

    @property
    def rpc(self) -> Rpc:
        """Of the application."""
        return self.app.rpc

    @property
    def url(self) -> str:
        """For the client."""
        return self.target.url


def start_session(
    host: Host,
    bdevs: list[dict[str, Any]],
    bdev: str = CACHE,
    target: type[IscsiTarget | NvmfTarget] = IscsiTarget,
    **options: Any,
) -> Session:
    """Starts spdk_tgt with these bdevs and exports `bdev`."""
    app = host.start("spdk_tgt", bdevs=bdevs, **options)
    wait_online(app.rpc, bdev)
    return Session(app, target(app, bdev))


def bdev_info(rpc: Rpc, name: str) -> dict[str, Any] | None:
    """The entry of bdev_get_bdevs, if there is that bdev."""
    return next((bdev for bdev in rpc.bdev_get_bdevs() if bdev["name"] == name), None)


def cache_info(rpc: Rpc, name: str = CACHE) -> dict[str, Any] | None:
    """The entry of bdev_pcache_get_bdevs, also for a cache that has no bdev now."""
    return next((bdev for bdev in rpc.bdev_pcache_get_bdevs() if bdev["name"] == name), None)


def cache_state(rpc: Rpc, name: str = CACHE) -> str | None:
    """Of a cache, if it is known."""
    info = cache_info(rpc, name)
    return None if info is None else info["state"]


def cache_stats(rpc: Rpc, name: str = CACHE) -> dict[str, int]:
    """The figures of bdev_pcache_get_stats by "group.member", without distributions."""
    (stats,) = rpc.bdev_pcache_get_stats(name=name)
    groups = {group: members for group, members in stats.items() if group != "name"}
    return {
        f"{group}.{member}": value
        for group, members in groups.items()
        for member, value in members.items()
        if isinstance(value, int)
    }


def make_sick(rpc: Rpc, io_type: str, count: int = FOR_EVER) -> None:
    """So many operations of the base fail from now on; see `Storage.sick_base`."""
    rpc.bdev_error_inject_error(name=SICK, io_type=io_type, error_type="failure", num=count)


def heal(rpc: Rpc) -> None:
    """The base is well again."""
    rpc.bdev_error_inject_error(name=SICK, io_type="clear", error_type="failure", num=1)


def set_latency(rpc: Rpc, direction: str, latency_us: int) -> None:
    """How long each read or write takes from now on; see `Storage.slow_base`."""
    for kind in (f"avg_{direction}", f"p99_{direction}"):
        rpc.bdev_delay_update_latency(delay_bdev_name=SLOW, latency_type=kind, latency_us=latency_us)


def wait_online(rpc: Rpc, name: str = CACHE, timeout_s: float = 30.0) -> dict[str, Any]:
    """Until the bdev is there: recovery may take a while after create has answered."""
    return wait_until(lambda: bdev_info(rpc, name), f"{name} comes online", timeout_s)


def drain(rpc: Rpc, name: str = CACHE, timeout_s: float = 60.0, *, pause_s: float = 0.02) -> dict[str, Any]:
    """bdev_pcache_flush_start, and until it is done."""
    rpc.bdev_pcache_flush_start(name=name)

    def finished() -> dict[str, Any] | None:
        status = rpc.bdev_pcache_flush_status(name=name)
        return None if status["in_progress"] else status

    return wait_until(finished, f"{name} is drained", timeout_s, pause_s=pause_s)


def settle(rpc: Rpc, name: str = CACHE) -> None:
    """Until nothing is reclaimed any more: for a tenth of a second the number of free segments stays."""
    seen = None
    while (info := cache_info(rpc, name)) is not None and info["segments_free"] != seen:
        seen = info["segments_free"]
        time.sleep(0.1)


def base_read_bytes(rpc: Rpc) -> int:
    """What the base was asked for, be it there or not."""
    return cache_stats(rpc)["bytes.core_volume_rd"]


def drain_and_verify(rpc: Rpc, client: AckClient, storage: Storage) -> None:
    """Once everything is written back, the base holds it without the cache."""
    drain(rpc)
    assert_intact(client.verify_file(storage.base_file))


def cache_everything(session: Session, client: AckClient) -> None:
    """Writes, and reads until all of it comes from the cache and is clean there."""
    assert_intact(client.write(session.url, writes=1500, seconds=20))
    drain(session.rpc)

    def all_cached() -> bool:
        before = base_read_bytes(session.rpc)
        assert_intact(client.verify(session.url))
        return base_read_bytes(session.rpc) == before

    wait_until(all_cached, "nothing that is read is put into the cache anew", timeout_s=20)
    # What was read lies behind the dirty tail, too.
    drain(session.rpc)


def make_used_cache(host: Host, storage: Storage, client: AckClient, *, drained: bool) -> None:
    """A cache that has seen writes, and whose application has ended."""
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.write(session.url, seconds=1))
    if drained:
        drain(session.rpc)
    session.app.stop()


def digest(path: Path) -> str | None:
    """To see whether a file was changed; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def error_of(call: Any, **params: Any) -> RpcError:
    """The answer to a call that must be refused."""
    try:
        answer = call(**params)
    except RpcError as error:
        return error
    raise AssertionError(f"{params} was not refused, but answered with {answer}")


def assert_intact(result: ClientResult) -> None:
    """The client got what it was promised."""
    assert result.exit_code == 0, f"{result.summary}\n{result.complaints}"
