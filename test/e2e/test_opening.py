# SPDX-License-Identifier: BSD-3-Clause
"""A cache that takes long to open, or waits for its base: nobody else waits, and whoever asks is told."""

from __future__ import annotations

import errno
import signal
import time
from pathlib import Path
from typing import Any

from harness import App, Hold, Host, RpcError, wait_until
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    SICK,
    Storage,
    bdev_info,
    cache_info,
    cache_state,
    error_of,
    wait_online,
)

# Of a cache device of which the page tables are made at once.
STEP_MIB = 64
STEP_COUNT = 4
CACHE_MIB = 64
# After which a base that does not answer counts as stalled, and when it is reset in the end.
STALL_S, RESET_S = 15, 5


def error_bdev() -> dict[str, Any]:
    return {"method": "bdev_error_create", "params": {"base_name": BASE}}


def mapping_threads(hold: Hold, app: App) -> list[str]:
    """Who has made page tables, or is about to."""
    return hold.threads(app, "madvise", STEP_MIB * MIB)


def opened_at_last(host: Host, storage: Storage, hold: Hold) -> App:
    """A cache that was configured before its base, which has come; mapping lasts as long as a test wants."""
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base()], before_module=hold.library)
    app.rpc.bdev_wait_for_examine()
    app.rpc.bdev_pcache_create(**storage.cache_params(SICK))
    hold.hold("madvise")
    app.rpc.call(**error_bdev())
    wait_until(lambda: mapping_threads(hold, app), "page tables are made")
    return app


def test_an_application_that_ends_does_not_wait_for_an_opening(host: Host, media: Path, hold: Hold):
    """It holds the examination of its base, for which SPDK waits before it tells modules of the end."""
    storage = Storage(media, cache_mib=STEP_COUNT * STEP_MIB)
    app = opened_at_last(host, storage, hold)
    app.process.send_signal(signal.SIGTERM)

    def has_heard() -> bool:
        error = error_of(app.rpc.bdev_pcache_create, **storage.cache_params(SICK))
        return error.code == -errno.ESHUTDOWN

    wait_until(has_heard, "the module hears of the end", timeout_s=5)
    hold.let_go("madvise")
    app.stop()
    # The step that was under way was the last.
    assert len(mapping_threads(hold, app)) == 1
    assert f"given up with {STEP_MIB} of {STEP_COUNT * STEP_MIB} MiB populated" in app.log()


def test_a_base_that_is_removed_does_not_wait_for_the_mapping(host: Host, media: Path, hold: Hold, meanwhile):
    storage = Storage(media, cache_mib=STEP_COUNT * STEP_MIB)
    app = opened_at_last(host, storage, hold)
    removed = meanwhile(app, "bdev_error_delete", name=SICK)
    assert removed.result(timeout=10) is True
    assert bdev_info(app.rpc, SICK) is None
    app.rpc.bdev_wait_for_examine()
    info = cache_info(app.rpc)
    assert info is not None
    assert info["state"] == "opening"
    assert "removed" in info["reason"]
    assert "mapped" in info["reason"]
    hold.let_go("madvise")
    wait_until(lambda: cache_state(app.rpc) == "pending", "the cache waits for its base")
    # It comes back with it.
    app.rpc.call(**error_bdev())
    wait_online(app.rpc)
    app.stop()


def test_a_base_that_does_not_answer_is_told_of_and_holds_nobody_up(host: Host, media: Path, hold: Hold):
    storage = Storage(media, cache_mib=STEP_MIB)
    app = opened_at_last(host, storage, hold)
    info = cache_info(app.rpc)
    assert info is not None
    assert info["state"] == "opening"
    assert info["reason"] == "the cache device is being mapped"
    # What the base holds is noted in a new cache.
    app.rpc.bdev_error_inject_error(name=SICK, io_type="read", error_type="pending", num=100)
    hold.let_go("madvise")
    began = time.monotonic()
    # Whoever configures the application goes on without the cache.
    app.rpc.bdev_wait_for_examine()
    assert time.monotonic() - began > STALL_S - 5
    info = cache_info(app.rpc)
    assert info is not None
    assert info["state"] == "opening"
    assert f"reads of the base bdev {SICK} are under way" in info["reason"]
    assert info["state_age_s"] >= STALL_S - 5
    assert app.log().count("has answered no read for") == 1
    began = time.monotonic()
    app.stop()
    assert time.monotonic() - began < 2 * RESET_S
    assert "the base is reset" in app.log()


def test_memory_is_made_known_to_devices_by_other_threads(
    host: Host, media: Path, huge_file: Path, hold: Hold, meanwhile
):
    """And forgotten: each page is pinned for devices, which takes long."""
    storage = Storage(media, cache_mib=CACHE_MIB)
    app = host.start(
        "spdk_tgt", bdevs=[storage.malloc_base(), error_bdev()], before_module=hold.library, pci=True
    )
    app.rpc.bdev_wait_for_examine()
    params = storage.cache_params(SICK, cache_path=str(huge_file))

    def threads(call: str) -> list[str]:
        return hold.threads(app, call, CACHE_MIB * MIB)

    hold.hold("spdk_mem_register")
    created = meanwhile(app, "bdev_pcache_create", **params)
    wait_until(lambda: threads("spdk_mem_register"), "the cache device is registered")
    # The reactor answers.
    assert cache_state(app.rpc) == "opening"
    hold.let_go("spdk_mem_register")
    assert created.result() == CACHE
    assert threads("spdk_mem_register") == ["pcache-map"]

    hold.hold("spdk_mem_unregister")
    deleted = meanwhile(app, "bdev_pcache_delete", name=CACHE)
    wait_until(lambda: threads("spdk_mem_unregister"), "the cache device is unregistered")
    assert cache_state(app.rpc) == "removing"
    hold.let_go("spdk_mem_unregister")
    assert deleted.result() is True
    # Without addresses for devices it was unregistered at once.
    assert set(threads("spdk_mem_unregister")) <= {"pcache-map", "pcache-unmap"}

    count = len(threads("spdk_mem_unregister"))

    # A base that does not answer: given up half-way.
    app.rpc.bdev_error_inject_error(name=SICK, io_type="read", error_type="pending", num=100)
    huge_file.unlink(missing_ok=True)
    created = meanwhile(app, "bdev_pcache_create", **params)
    wait_until(lambda: len(threads("spdk_mem_register")) == 2, "the cache device is registered")
    deleted = meanwhile(app, "bdev_pcache_delete", name=CACHE)
    assert deleted.result() is True
    assert isinstance(created.exception(), RpcError)
    assert len(threads("spdk_mem_unregister")) > count
    assert set(threads("spdk_mem_unregister")) <= {"pcache-map", "pcache-unmap"}
    app.stop()
