# SPDX-License-Identifier: BSD-3-Clause
"""A cache knows its base, and does not touch what is not its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import AckClient, App, Host, RpcError
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    Storage,
    assert_intact,
    bdev_info,
    digest,
    make_used_cache,
    start_session,
    wait_online,
)
from harness.targets import IscsiTarget


def refused(app: App, storage: Storage, **overrides) -> RpcError:
    """A create that must fail and must leave cache file, base and bdevs as they were."""
    cache_before, base_before = digest(storage.cache_file), digest(storage.base_file)
    space_before = storage.cache_file.stat().st_blocks
    with pytest.raises(RpcError) as caught:
        app.rpc.call("bdev_pcache_create", storage.cache_params(**overrides))
    assert bdev_info(app.rpc, CACHE) is None
    assert not bdev_info(app.rpc, BASE)["claimed"]
    assert digest(storage.cache_file) == cache_before
    assert storage.cache_file.stat().st_blocks == space_before, "holes of a file were filled"
    assert digest(storage.base_file) == base_before
    return caught.value


def test_base_of_another_size_is_refused(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    os.truncate(storage.base_file, (storage.base_mib + 1) * MIB)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    error = refused(app, storage)
    blocks = storage.base_mib * MIB // storage.block_size
    assert str(blocks) in error.message
    assert str(blocks + MIB // storage.block_size) in error.message
    app.stop()
    # The right one is taken.
    os.truncate(storage.base_file, storage.base_mib * MIB)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_base_of_another_block_size_is_refused(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    storage.block_size = 4096
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    error = refused(app, storage)
    assert "512" in error.message
    assert "4096" in error.message
    app.stop()


def test_base_with_other_content_is_refused(host: Host, media: Path, seed: int):
    """Same name, same size: only the witness tells."""
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=True)
    right = storage.base_file.read_bytes()
    other = AckClient(
        media / "other-journal",
        block_size=storage.block_size,
        block_count=len(right) // storage.block_size,
        seed=seed + 1,
    )
    other.create(storage.base_file)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    error = refused(app, storage)
    assert BASE in error.message
    app.stop()
    storage.base_file.write_bytes(right)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_foreign_file_is_refused_and_can_be_forced(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    storage.cache_file.write_bytes(os.urandom(storage.cache_mib * MIB))
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    error = refused(app, storage)
    assert str(storage.cache_file) in error.message
    refused(app, storage, format="never")
    app.rpc.bdev_pcache_create(**storage.cache_params(format="force"))
    wait_online(app.rpc, CACHE)
    target = IscsiTarget(app, CACHE)
    assert_intact(client.verify(target.url))
    app.stop()


def test_refused_file_keeps_its_holes(host: Host, media: Path, seed: int):
    """It may be somebody else's, larger than what is free."""
    storage = Storage(media)
    client = storage.client(seed)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    storage.cache_file.write_bytes(os.urandom(64 << 10))
    os.truncate(storage.cache_file, storage.cache_mib * MIB)
    refused(app, storage)
    storage.cache_file.write_bytes(b"")
    os.truncate(storage.cache_file, storage.cache_mib * MIB)
    refused(app, storage, format="never")
    # It is blank, and that is fine.
    app.rpc.bdev_pcache_create(**storage.cache_params())
    wait_online(app.rpc, CACHE)
    target = IscsiTarget(app, CACHE)
    assert_intact(client.verify(target.url))
    app.stop()


def test_damaged_superblock_is_no_blank_device(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    with storage.cache_file.open("r+b") as file:
        file.write(os.urandom(64 << 10))
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    refused(app, storage)
    app.stop()


def test_file_with_data_behind_a_blank_start_is_refused_or_kept(host: Host, media: Path):
    """A text file is no cache device, however small it is."""
    storage = Storage(media)
    storage.client()
    storage.cache_file.write_text("not a cache\n")
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    error = refused(app, storage)
    assert str(storage.cache_file) in error.message
    app.stop()


def test_truncated_file_is_refused(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    whole = storage.cache_file.read_bytes()
    os.truncate(storage.cache_file, len(whole) // 2)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    error = refused(app, storage)
    assert str(storage.cache_file) in error.message
    app.stop()
    storage.cache_file.write_bytes(whole)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


@pytest.mark.parametrize("change", [{"data_crc": True}, {"segment_size_kib": 512}])
def test_changed_immutable_option_is_refused(host: Host, media: Path, seed: int, change: dict):
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=False)
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    refused(app, storage, **change)
    app.stop()


def test_second_process_is_refused(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    second = host.start("spdk_tgt", bdevs=[storage.aio_base()], first_core=1)
    for policy in ("auto", "never", "force"):
        with pytest.raises(RpcError) as caught:
            second.rpc.call("bdev_pcache_create", storage.cache_params(format=policy))
        assert caught.value.code == -16, caught.value
        assert str(storage.cache_file) in caught.value.message
    assert not bdev_info(second.rpc, BASE)["claimed"]
    # The first one did not notice.
    assert_intact(client.write(session.url, seconds=1))
    assert_intact(client.verify(session.url))
    session.app.stop()
    # Now the device is free.
    second.rpc.bdev_pcache_create(**storage.cache_params())
    target = IscsiTarget(second, CACHE)
    assert_intact(client.verify(target.url))
    second.stop()


def test_second_cache_of_the_process_on_one_file_is_refused(host: Host, media: Path):
    storage = Storage(media)
    storage.client()
    app = host.start("spdk_tgt", bdevs=[storage.aio_base(), storage.malloc_base("Other")])
    app.rpc.bdev_pcache_create(**storage.cache_params())
    for policy in ("auto", "force"):
        with pytest.raises(RpcError) as caught:
            app.rpc.call("bdev_pcache_create", storage.cache_params("Other", name="Second", format=policy))
        assert str(storage.cache_file) in caught.value.message
    app.stop()


def test_renamed_application_of_the_same_base_is_the_same_base(host: Host, media: Path, seed: int):
    """An aio bdev has a random uuid at each start; that alone refuses nothing."""
    storage = Storage(media)
    client = storage.client(seed)
    make_used_cache(host, storage, client, drained=True)
    session = start_session(host, [storage.aio_base(), storage.cache()])
    first = bdev_info(session.rpc, BASE)["uuid"]
    session.app.stop()
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert bdev_info(session.rpc, BASE)["uuid"] != first
    assert_intact(client.verify(session.url))
    session.app.stop()
