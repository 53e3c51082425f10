# SPDX-License-Identifier: BSD-3-Clause
"""A create that cannot work is refused by name and value, and has changed nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Host, RpcError
from harness.scenario import BASE, CACHE, Storage, bdev_info, wait_online

INVALID_PARAMS = -32602
ANY_ERRNO = range(-4095, 0)

# What is wrong; the override (None: left out); the code; what the message must name.
BAD_PARAMETERS: list[tuple[str, dict[str, Any], Any, str]] = [
    ("no name", {"name": None}, INVALID_PARAMS, "name"),
    ("no base", {"base_bdev_name": None}, INVALID_PARAMS, "base_bdev_name"),
    ("no path", {"cache_path": None}, INVALID_PARAMS, "cache_path"),
    ("unknown parameter", {"cache_mode": "wb"}, INVALID_PARAMS, "cache_mode"),
    ("name is a number", {"name": 5}, INVALID_PARAMS, "5"),
    ("base is a list", {"base_bdev_name": ["x"]}, INVALID_PARAMS, "base_bdev_name"),
    ("empty name", {"name": ""}, INVALID_PARAMS, "name"),
    ("name too long", {"name": "n" * 300}, INVALID_PARAMS, "name"),
    ("name is the base's", {"name": BASE}, INVALID_PARAMS, BASE),
    ("empty path", {"cache_path": ""}, INVALID_PARAMS, "cache_path"),
    ("relative path", {"cache_path": "cache.pmem"}, INVALID_PARAMS, "cache.pmem"),
    ("size is a text", {"cache_size_mib": "64"}, INVALID_PARAMS, '"64"'),
    ("size is negative", {"cache_size_mib": -64}, INVALID_PARAMS, "-64"),
    ("size is a fraction", {"cache_size_mib": 64.5}, INVALID_PARAMS, "64.5"),
    ("size is zero", {"cache_size_mib": 0}, INVALID_PARAMS, "0"),
    ("size beyond everything", {"cache_size_mib": 1 << 60}, INVALID_PARAMS, str(1 << 60)),
    ("crc is a text", {"data_crc": "on"}, INVALID_PARAMS, '"on"'),
    ("crc is a number", {"data_crc": 1}, INVALID_PARAMS, "1"),
    ("segment no power of two", {"segment_size_kib": 1000}, INVALID_PARAMS, "1000"),
    ("segment of zero", {"segment_size_kib": 0}, INVALID_PARAMS, "0"),
    ("segment too small", {"segment_size_kib": 8}, INVALID_PARAMS, "8"),
    ("segment too large", {"segment_size_kib": 1 << 22}, INVALID_PARAMS, str(1 << 22)),
    ("gc above 90", {"gc_percent": 91}, INVALID_PARAMS, "91"),
    ("gc negative", {"gc_percent": -1}, INVALID_PARAMS, "-1"),
    ("gc is a text", {"gc_percent": "70"}, INVALID_PARAMS, '"70"'),
    ("unknown order", {"writeback_order": "fast"}, INVALID_PARAMS, "fast"),
    ("unknown format", {"format": "maybe"}, INVALID_PARAMS, "maybe"),
    ("format is a boolean", {"format": True}, INVALID_PARAMS, "true"),
    ("low above high", {"dirty_low_percent": 9, "dirty_high_percent": 8}, INVALID_PARAMS, "is 9"),
    ("too few segments", {"segment_size_kib": 1 << 15}, ANY_ERRNO, str(32 << 20)),
    ("larger than the disk", {"cache_size_mib": 1 << 24}, ANY_ERRNO, "cache"),
    ("no file and no size", {"cache_size_mib": None}, ANY_ERRNO, "cache_size_mib"),
    ("blank and never format", {"format": "never"}, ANY_ERRNO, "never"),
    ("folder does not exist", {"cache_path": "/nonexistent/c"}, ANY_ERRNO, "/nonexistent/c"),
    ("path is a folder", {"cache_path": "/dev/shm"}, ANY_ERRNO, "/dev/shm"),
    ("path is a character device", {"cache_path": "/dev/zero"}, ANY_ERRNO, "/dev/zero"),
    ("path cannot be written", {"cache_path": "/sys/kernel/uevent_seqnum"}, ANY_ERRNO, "uevent"),
    ("separate metadata", {"base_bdev_name": "Metadata"}, ANY_ERRNO, "Metadata"),
    ("zoned base", {"base_bdev_name": "Zoned"}, ANY_ERRNO, "Zoned"),
    ("odd block size", {"base_bdev_name": "Interleaved"}, ANY_ERRNO, "Interleaved"),
    ("claimed base", {"base_bdev_name": "Claimed"}, ANY_ERRNO, "Claimed"),
    ("name is taken", {"name": "Claimed"}, ANY_ERRNO, "Claimed"),
]


def bdevs_for_errors(storage: Storage) -> list[dict[str, Any]]:
    """A good base, and one of each kind that cannot be cached."""

    def malloc(name: str, **params: Any) -> dict[str, Any]:
        params = {"num_blocks": 65536, "block_size": 512, "name": name, **params}
        return {"method": "bdev_malloc_create", "params": params}

    def entry(method: str, **params: Any) -> dict[str, Any]:
        return {"method": method, "params": params}

    return [
        storage.aio_base(),
        malloc("Metadata", md_size=8),
        malloc("Interleaved", md_size=8, md_interleave=True),
        malloc("UnderZoned"),
        entry(
            "bdev_zone_block_create",
            name="Zoned",
            base_bdev="UnderZoned",
            zone_capacity=4096,
            optimal_open_zones=1,
        ),
        malloc("Claimed"),
        entry("bdev_passthru_create", name="Owner", base_bdev_name="Claimed"),
    ]


def test_bad_parameters_are_refused(host: Host, media: Path, subtests_of_a_table):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=bdevs_for_errors(storage))
    names_before = {bdev["name"]: bdev["claimed"] for bdev in app.rpc.bdev_get_bdevs()}
    media_before = sorted(path.name for path in media.iterdir())

    for what, override, code, named in BAD_PARAMETERS:
        with subtests_of_a_table(what):
            with pytest.raises(RpcError) as caught:
                app.rpc.call("bdev_pcache_create", storage.cache_params(**override))
            if code is ANY_ERRNO:
                assert caught.value.code in ANY_ERRNO, caught.value
            else:
                assert caught.value.code == code, caught.value
            assert named in caught.value.message
            names_now = {bdev["name"]: bdev["claimed"] for bdev in app.rpc.bdev_get_bdevs()}
            assert names_now == names_before
            assert app.rpc.bdev_pcache_get_bdevs() == []
            assert sorted(path.name for path in media.iterdir()) == media_before

    # After all these it still works.
    app.rpc.bdev_pcache_create(**storage.cache_params())
    wait_online(app.rpc, CACHE)
    app.stop()


def test_name_of_an_existing_cache_is_refused(host: Host, media: Path):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=[storage.aio_base(), storage.malloc_base("Other")])
    app.rpc.bdev_pcache_create(**storage.cache_params())
    other = storage.cache_params("Other", cache_path=str(media / "other.pmem"))
    with pytest.raises(RpcError) as caught:
        app.rpc.call("bdev_pcache_create", other)
    assert CACHE in caught.value.message
    assert not (media / "other.pmem").exists()
    assert not bdev_info(app.rpc, "Other")["claimed"]
    app.stop()


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("bdev_pcache_delete", {}),
        ("bdev_pcache_get_stats", {}),
        ("bdev_pcache_reset_stats", {}),
        ("bdev_pcache_flush_start", {}),
        ("bdev_pcache_flush_status", {}),
        ("bdev_pcache_set_options", {"gc_percent": 50}),
        ("bdev_pcache_get_bdevs", {}),
    ],
)
def test_other_methods_name_the_cache_that_is_missing(host: Host, method: str, params: dict):
    app = host.start("spdk_tgt")
    with pytest.raises(RpcError) as caught:
        app.rpc.call(method, {"name": "Nobody", **params})
    assert caught.value.code == -19
    assert "Nobody" in caught.value.message


def test_bad_options_change_nothing(host: Host, media: Path):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=[storage.aio_base(), storage.cache(gc_percent=33)])
    wait_online(app.rpc, CACHE)
    for params in ({"gc_percent": 91}, {"writeback_order": "none"}, {}, {"gc_percent": "3"}):
        with pytest.raises(RpcError) as caught:
            app.rpc.call("bdev_pcache_set_options", {"name": CACHE, **params})
        assert caught.value.code == INVALID_PARAMS
    config = app.rpc.framework_get_config(name="bdev")
    params = next(e["params"] for e in config if e["method"] == "bdev_pcache_create")
    assert params["gc_percent"] == 33
    app.stop()
