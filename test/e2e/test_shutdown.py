# SPDX-License-Identifier: BSD-3-Clause
"""What is asked for while the application ends: SPDK answers until nothing is left."""

from __future__ import annotations

import contextlib
import errno
import signal
from pathlib import Path
from typing import Any

from harness import App, Host, IscsiTarget, RpcConnectionLost, RpcError, wait_until
from harness.scenario import (
    CACHE,
    SLOW,
    Session,
    Storage,
    assert_intact,
    cache_info,
    cache_state,
    error_of,
    set_latency,
    start_session,
)

OTHER = "Other0"
OTHER_BASE = "OtherBase0"
BETWEEN = "Between"
# As long as the tests need between the beginning and the end of the end.
LATENCY_US = 3_000_000


def other_storage(media: Path) -> Storage:
    folder = media / "other"
    folder.mkdir()
    return Storage(folder, base_mib=32)


def begin_end(app: App, storage: Storage) -> None:
    """SIGTERM, and until the module has heard of it."""
    app.process.send_signal(signal.SIGTERM)

    def has_heard() -> bool:
        error = error_of(app.rpc.bdev_pcache_create, **storage.cache_params(SLOW))
        return error.code == -errno.ESHUTDOWN

    wait_until(has_heard, "the application ends")


def written_to_slow_base(host: Host, storage: Storage, bdevs: list[dict[str, Any]], seed: int) -> Session:
    """A cache that is writing to its base, which takes long."""
    client = storage.client(seed)
    session = start_session(host, bdevs)
    assert_intact(client.write(session.url, seconds=0.5))
    set_latency(session.rpc, "write", LATENCY_US)
    session.rpc.bdev_pcache_flush_start(name=CACHE)
    wait_until(lambda: cache_info(session.rpc)["base_operations"] > 0, "the base is being written to")
    return session


def test_a_drain_is_refused_while_the_application_ends(host: Host, media: Path, seed: int, meanwhile):
    storage, other = Storage(media), other_storage(media)
    bdevs = [
        *storage.slow_base(),
        storage.cache(SLOW),
        other.malloc_base(OTHER_BASE),
        other.cache(OTHER_BASE, name=OTHER),
    ]
    session = written_to_slow_base(host, storage, bdevs, seed)
    deleted = meanwhile(session.app, "bdev_pcache_delete", name=CACHE)
    wait_until(lambda: cache_state(session.rpc) == "removing", "the cache is being closed")
    begin_end(session.app, storage)
    error = error_of(session.rpc.bdev_pcache_delete, name=OTHER, drain=True)
    assert error.code == -errno.ESHUTDOWN
    assert cache_state(session.rpc, OTHER) == "online"
    assert deleted.result() is True
    session.app.stop()


def test_a_base_is_removed_while_spdk_takes_its_bdevs_away(host: Host, media: Path, seed: int, meanwhile):
    """SPDK goes through all bdevs then, and stumbles over those that are on their way out already."""
    storage, other = Storage(media), other_storage(media)
    other_client = other.client(seed)
    passthru = {"name": BETWEEN, "base_bdev_name": OTHER_BASE}
    other_bdevs = [
        other.aio_base(OTHER_BASE),
        {"method": "bdev_passthru_create", "params": passthru},
        other.cache(BETWEEN, name=OTHER),
    ]
    # SPDK begins with the last one, and waits for the end of what it has begun.
    session = written_to_slow_base(
        host, storage, [*other_bdevs, *storage.slow_base(), storage.cache(SLOW)], seed
    )
    app = session.app
    assert_intact(other_client.write(IscsiTarget(app, OTHER, number=2).url, seconds=0.5))
    begin_end(app, storage)
    wait_until(lambda: cache_state(app.rpc) == "removing", "SPDK takes the first bdev away")
    removed = meanwhile(app, "bdev_passthru_delete", name=BETWEEN)
    wait_until(lambda: f"the base bdev {BETWEEN} is removed" in app.log(), "the cache hears of its base")
    assert cache_state(app.rpc, OTHER) == "online"
    error = error_of(app.rpc.bdev_pcache_delete, name=OTHER)
    assert error.code == -errno.ESHUTDOWN
    app.stop()
    with contextlib.suppress(RpcError, RpcConnectionLost):
        removed.result()
    session = start_session(host, other_bdevs, OTHER)
    assert_intact(other_client.verify(session.url))
    session.app.stop()
