# SPDX-License-Identifier: BSD-3-Clause
"""A cache whose base is there and was not had: when it is tried again."""

from __future__ import annotations

import time
from pathlib import Path

from harness import Host, Rpc, wait_until
from harness.scenario import (
    BASE,
    CACHE,
    SICK,
    Storage,
    assert_intact,
    bdev_info,
    cache_info,
    drain,
    heal,
    make_sick,
    start_session,
    wait_online,
)
from harness.targets import IscsiTarget

BETWEEN = "Between"


def reason(rpc: Rpc) -> str:
    info = cache_info(rpc)
    assert info is not None
    return info["reason"] if info["state"] == "pending" else ""


def looks(rpc: Rpc) -> int:
    """How often whatever waits has been looked at."""
    pollers = [poller for thread in rpc.thread_get_pollers()["threads"] for poller in thread["timed_pollers"]]
    return next(poller["run_count"] for poller in pollers if poller["name"] == "pcache_look")


def test_a_base_that_could_not_be_read_is_tried_again(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    passthru = {"name": BETWEEN, "base_bdev_name": SICK}
    base = [*storage.sick_base()[:-1], {"method": "bdev_passthru_create", "params": passthru}]
    session = start_session(host, [*base, storage.cache(BETWEEN)])
    assert_intact(client.write(session.url, seconds=0.5))
    # What was written back last is looked for on the base when the cache is opened, unless it is dirty again.
    drain(session.rpc)
    session.app.stop()

    app = host.start("spdk_tgt", bdevs=[*base[:-1], storage.cache(BETWEEN)])
    make_sick(app.rpc, "read")
    app.rpc.bdev_passthru_create(**passthru)
    wait_until(lambda: "could not be read" in reason(app.rpc), "the cache cannot be opened")

    def failures() -> int:
        return app.log().count("could not be read from the base device")

    # It is tried again, in vain, and goes on waiting.
    wait_until(lambda: failures() >= 2, "another attempt")
    assert "could not be read" in reason(app.rpc)
    # It has waited since the first.
    assert cache_info(app.rpc)["state_age_s"] >= 1
    heal(app.rpc)
    wait_online(app.rpc)
    assert_intact(client.verify(IscsiTarget(app, CACHE).url))
    app.stop()


def test_a_cache_device_that_was_in_use_is_tried_again(host: Host, media: Path):
    """Somebody else has it for a moment: a process that has not ended quite yet."""
    storage, other = Storage(media), Storage(media)
    holder = host.start("spdk_tgt", bdevs=[other.malloc_base()])
    holder.rpc.bdev_pcache_create(**other.cache_params())
    wait_online(holder.rpc)
    app = host.start("spdk_tgt", bdevs=[storage.cache(format="force")])
    base = storage.malloc_base()
    app.rpc.call(base["method"], base["params"])
    wait_until(lambda: "in use by another cache" in reason(app.rpc), "the cache device is locked")
    holder.kill()
    wait_online(app.rpc)
    app.stop()


def test_a_base_that_was_refused_is_not_tried_again(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt", bdevs=[storage.cache()])
    with_metadata = storage.malloc_base()
    with_metadata["params"]["md_size"] = 8
    app.rpc.call(with_metadata["method"], with_metadata["params"])
    wait_until(lambda: "metadata" in reason(app.rpc), "the base is refused")
    time.sleep(3)
    assert app.log().count("without metadata is needed") == 1
    app.stop()


def test_another_base_that_nobody_examines_is_tried(host: Host, media: Path):
    """It comes so soon after the one that was refused that nobody sees the name without a bdev."""
    storage = Storage(media)
    options = {"method": "bdev_set_options", "params": {"bdev_auto_examine": False}}
    app = host.start("spdk_tgt", bdevs=[options, storage.cache()])
    base, with_metadata = storage.malloc_base(), storage.malloc_base()
    with_metadata["params"]["md_size"] = 8
    app.rpc.call(with_metadata["method"], with_metadata["params"])
    wait_until(lambda: "metadata" in reason(app.rpc), "the base is refused", timeout_s=5)
    # The next look is a second away then. The name is free when the deletion has ended, not at once.
    before = looks(app.rpc)
    wait_until(lambda: looks(app.rpc) > before, "a look at the base", pause_s=0.002)
    app.rpc.bdev_malloc_delete(name=BASE)
    app.rpc.call(base["method"], base["params"])
    wait_online(app.rpc)
    assert bdev_info(app.rpc, BASE)["claimed"]
    app.stop()
