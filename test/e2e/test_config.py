# SPDX-License-Identifier: BSD-3-Clause
"""Configuration files, save_config and load_config, the command line, options, statistics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import App, Host, wait_until
from harness.paths import PLUGIN_DIR
from harness.scenario import (
    BASE,
    CACHE,
    Storage,
    assert_intact,
    bdev_info,
    cache_info,
    cache_state,
    cache_stats,
    drain,
    settle,
    start_session,
    wait_online,
)

SPDK_RPC = Path(sys.executable).with_name("spdk-rpc")


def spdk_rpc(app: App, *arguments: str, command: list[str] | None = None) -> str:
    """Runs the published command-line client with the plugin."""
    done = subprocess.run(
        [*(command or [SPDK_RPC]), "-s", app.socket_path, "--plugin", "pcache_rpc", *arguments],
        env=dict(os.environ, PYTHONPATH=str(PLUGIN_DIR)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def saved_bdevs(config: dict) -> list[dict]:
    """The bdev part of a saved configuration."""
    return next(s["config"] for s in config["subsystems"] if s["subsystem"] == "bdev")


def saved_cache(config: dict) -> dict:
    return next(e for e in saved_bdevs(config) if e["method"] == "bdev_pcache_create")["params"]


def test_cache_before_its_base_in_the_configuration(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.cache(), storage.aio_base()])
    assert_intact(client.verify(session.url))
    session.app.stop()


@pytest.mark.parametrize("auto_examine", [True, False])
def test_created_before_its_base_appears(host: Host, media: Path, seed: int, auto_examine: bool):
    storage = Storage(media)
    storage.client(seed)
    options = {"method": "bdev_set_options", "params": {"bdev_auto_examine": auto_examine}}
    app = host.start("spdk_tgt", bdevs=[options])
    assert app.rpc.bdev_pcache_create(**storage.cache_params()) == CACHE
    assert bdev_info(app.rpc, CACHE) is None
    assert cache_info(app.rpc)["state"] == "pending"
    base = storage.aio_base()
    app.rpc.call(base["method"], base["params"])
    wait_online(app.rpc, CACHE)
    assert cache_info(app.rpc)["state"] == "online"
    app.stop()


def test_a_base_that_another_cache_cannot_use_is_free(host: Host, media: Path, seed: int):
    storage = Storage(media)
    storage.client(seed)
    app = host.start("spdk_tgt")
    # The first to wait is the first to try, and its cache device is lost.
    lost = {"name": "Lost", "cache_path": str(media / "lost.pmem"), "format": "never"}
    app.rpc.bdev_pcache_create(**storage.cache_params(**lost))
    app.rpc.bdev_pcache_create(**storage.cache_params())
    base = storage.aio_base()
    app.rpc.call(base["method"], base["params"])
    wait_online(app.rpc, CACHE)
    assert "lost.pmem" in cache_info(app.rpc, "Lost")["reason"]
    app.stop()


def test_name_that_is_taken_while_a_pending_cache_is_opened(host: Host, media: Path, seed: int, meanwhile):
    # Large enough for its mapping to take a while.
    storage = Storage(media, cache_mib=2048, options={})
    storage.client(seed)
    app = host.start("spdk_tgt")
    app.rpc.bdev_pcache_create(**storage.cache_params())
    base = meanwhile(app, "bdev_aio_create", **storage.aio_base()["params"])
    wait_until(lambda: cache_state(app.rpc) != "pending", "the cache is being opened", pause_s=0.001)
    app.rpc.bdev_malloc_create(name=CACHE, num_blocks=2048, block_size=512)
    assert base.result() == BASE
    wait_until(lambda: cache_state(app.rpc) == "pending", "the cache is given up")
    assert "registered" in cache_info(app.rpc)["reason"]
    assert not bdev_info(app.rpc, BASE)["claimed"]
    assert not storage.cache_file.exists()
    # With its name free it comes when the base does.
    app.rpc.bdev_malloc_delete(name=CACHE)
    app.rpc.bdev_aio_delete(name=BASE)
    app.rpc.call("bdev_aio_create", storage.aio_base()["params"])
    assert wait_online(app.rpc)["product_name"] != "Malloc disk"
    assert app.rpc.bdev_pcache_delete(name=CACHE) is True
    assert app.rpc.bdev_pcache_get_bdevs() == []
    app.stop()


def test_pending_cache_can_be_deleted(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt")
    app.rpc.bdev_pcache_create(**storage.cache_params())
    assert app.rpc.bdev_pcache_delete(name=CACHE) is True
    assert app.rpc.bdev_pcache_get_bdevs() == []
    app.stop()


def test_saved_configuration_gives_the_same_cache(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache(gc_percent=55)])
    session.rpc.bdev_pcache_set_options(name=CACHE, writeback_order="relaxed")
    assert_intact(client.write(session.url, seconds=1))
    saved = spdk_rpc(session.app, "save_config")
    assert saved_cache(json.loads(saved))["gc_percent"] == 55
    assert saved_cache(json.loads(saved))["writeback_order"] == "relaxed"
    session.app.stop()

    config = media / "saved.json"
    config.write_text(saved)
    app = host.start("spdk_tgt", config_file=config)
    wait_online(app.rpc, CACHE)
    assert json.loads(spdk_rpc(app, "save_config")) == json.loads(saved)
    assert_intact(client.verify(session.url))
    app.stop()
    # load_config repeats the calls of the file in an application that is up already.
    config.write_text(
        json.dumps({"subsystems": [{"subsystem": "bdev", "config": saved_bdevs(json.loads(saved))}]})
    )
    app = host.start("spdk_tgt")
    spdk_rpc(app, "load_config", "-j", str(config))
    wait_online(app.rpc, CACHE)
    assert saved_bdevs(json.loads(spdk_rpc(app, "save_config"))) == saved_bdevs(json.loads(saved))
    app.stop()


def test_command_line(host: Host, media: Path, seed: int):
    storage = Storage(media)
    storage.client(seed)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    size = str(storage.cache_mib)
    path = str(storage.cache_file)
    create = ["bdev_pcache_create", "-b", CACHE, "-B", BASE, "-p", path, "-s", size]
    assert spdk_rpc(app, *create, "--segment-size-kib", "1024", "--data-crc").strip() == CACHE
    bdevs = json.loads(spdk_rpc(app, "bdev_pcache_get_bdevs"))
    assert [bdev["name"] for bdev in bdevs] == [CACHE]
    assert json.loads(spdk_rpc(app, "bdev_pcache_get_stats", "-b", CACHE))
    spdk_rpc(app, "bdev_pcache_set_options", "-b", CACHE, "--gc-percent", "30", "--verify-reads")
    spdk_rpc(app, "bdev_pcache_set_options", "-b", CACHE, "--no-verify-reads")
    spdk_rpc(app, "bdev_pcache_reset_stats", "-b", CACHE)
    spdk_rpc(app, "bdev_pcache_flush_start", "-b", CACHE)
    assert "in_progress" in json.loads(spdk_rpc(app, "bdev_pcache_flush_status", "-b", CACHE))
    spdk_rpc(app, "bdev_pcache_delete", "-b", CACHE, "--drain")
    assert bdev_info(app.rpc, CACHE) is None
    app.stop()


def test_command_line_of_the_spdk_tree(host: Host, media: Path, seed: int):
    if host.spdk.tree is None:
        pytest.skip("an installed SPDK has no scripts/rpc.py")
    storage = Storage(media)
    storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    command = ["/usr/bin/python3", str(host.spdk.tree / "scripts/rpc.py")]
    bdevs = json.loads(spdk_rpc(session.app, "bdev_pcache_get_bdevs", command=command))
    assert [bdev["name"] for bdev in bdevs] == [CACHE]
    session.app.stop()


def test_what_bdev_get_bdevs_tells(host: Host, media: Path, seed: int):
    storage = Storage(media)
    storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    base, cache = bdev_info(session.rpc, BASE), bdev_info(session.rpc, CACHE)
    assert (cache["block_size"], cache["num_blocks"]) == (base["block_size"], base["num_blocks"])
    assert base["claimed"]
    own = cache["driver_specific"]["pcache"]
    assert own["name"] == CACHE
    assert own["base_bdev_name"] == BASE
    assert own["cache_path"] == str(storage.cache_file)
    assert own["state"] == "online"
    # A file in memory survives the process and no power cut, and says so.
    assert own["durability"] == "process"
    assert cache_info(session.rpc)["durability"] == "process"
    supported = {name for name, yes in cache["supported_io_types"].items() if yes}
    assert {"read", "write", "unmap", "flush", "reset", "write_zeroes", "abort"} <= supported
    assert not {"nvme_admin", "nvme_io", "seek_data", "zone_append"} & supported
    session.app.stop()


def test_a_write_cache_is_reported_unless_told_otherwise(host: Host, media: Path, seed: int):
    """The configuration keeps it."""
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert session.target.has_write_cache()
    session.app.stop()
    session = start_session(host, [storage.aio_base(), storage.cache(report_write_cache=False)])
    assert not session.target.has_write_cache()
    assert saved_cache(json.loads(spdk_rpc(session.app, "save_config")))["report_write_cache"] is False
    # Whoever flushes all the same is answered.
    assert_intact(client.write(session.url, seconds=1))
    session.app.stop()


def test_statistics_count_and_can_be_reset(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    rpc = session.rpc
    assert_intact(client.write(session.url, seconds=1))
    drain(rpc)
    # What is clean may be reclaimed until enough is free.
    settle(rpc)
    (before,) = rpc.bdev_pcache_get_stats(name=CACHE)
    counted = cache_stats(rpc)
    assert counted["requests.wr_total"] > 0
    # SPDK has counted the same.
    (iostat,) = rpc.bdev_get_iostat(name=CACHE)["bdevs"]
    assert counted["bytes.volume_wr"] == iostat["bytes_written"]
    assert counted["requests.rd_total"] == iostat["num_read_ops"]
    assert iostat["driver_specific"]["pcache"].keys() == before.keys() - {"name"}
    # What was written is on the base, or was overwritten before.
    assert counted["writeback.dirty_bytes"] == counted["usage.dirty"] == 0
    spared = counted["writeback.absorbed_bytes"]
    assert counted["bytes.core_volume_wr"] + spared == counted["writeback.batch_bytes"]
    assert counted["writeback.batch_bytes"] == counted["bytes.volume_wr"]
    parts = ("occupancy", "free", "dead", "quarantined")
    assert sum(before["usage"][part] for part in parts) == before["usage"]["size"]
    assert before["log"]["batch_requests"]["count"] == sum(before["log"]["batch_requests"]["buckets"])
    for phase in ("gather_us", "base_write_us", "base_flush_us"):
        assert before["latency"][phase]["sum"] > 0, phase
    assert rpc.bdev_pcache_reset_stats(name=CACHE) is True
    assert len(rpc.bdev_pcache_get_stats()) == 1
    again = cache_stats(rpc)
    assert again["bytes.volume_total"] == again["requests.total"] == 0
    # What is there now stays.
    assert again["usage.occupancy"] == counted["usage.occupancy"] > 0
    session.app.stop()


def test_options_survive_a_restart(host: Host, media: Path, seed: int):
    storage = Storage(media)
    storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    session.rpc.bdev_pcache_set_options(name=CACHE, gc_percent=42, writeback_order="relaxed")
    session.app.stop()
    # Nothing is said about them this time.
    session = start_session(host, [storage.aio_base(), storage.cache()])
    params = saved_cache(json.loads(spdk_rpc(session.app, "save_config")))
    assert (params["gc_percent"], params["writeback_order"]) == (42, "relaxed")
    session.app.stop()
