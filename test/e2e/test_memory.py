# SPDX-License-Identifier: BSD-3-Clause
"""An application that gets no more memory: a create is refused, and nothing else suffers."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import App, Host, IscsiTarget
from harness.scenario import (
    BASE,
    CACHE,
    MIB,
    Storage,
    assert_intact,
    bdev_info,
    digest,
    drain_and_verify,
    error_of,
    start_session,
    wait_online,
)

OTHER = "Other0"
# What the cache below needs is some 30 MiB. It gets nothing for the first request, or for a later one.
ROOMS_MIB = (7, 13, 19, 25)


@contextlib.contextmanager
def room_for(app: App, size_mib: int) -> Iterator[None]:
    """The application gets so much memory of its own, and no more."""
    status = Path(f"/proc/{app.process.pid}/status").read_text()
    used_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    before = resource.prlimit(app.process.pid, resource.RLIMIT_DATA)
    limit = (used_kib << 10) + size_mib * MIB
    resource.prlimit(app.process.pid, resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(app.process.pid, resource.RLIMIT_DATA, before)


def check_refused(app: App, storage: Storage, size_mib: int) -> str:
    """What for there was no memory. The file is as it was; the base and the lock are given back."""
    before = digest(storage.cache_file)
    with room_for(app, size_mib):
        error = error_of(app.rpc.bdev_pcache_create, **storage.cache_params())
    assert error.code == -errno.ENOMEM, error
    assert "there is no memory for " in error.message, error
    assert " MiB are wanted" in error.message, error
    assert str(storage.cache_file) in error.message, error
    assert digest(storage.cache_file) == before
    assert app.rpc.bdev_pcache_get_bdevs() == []
    base = bdev_info(app.rpc, BASE)
    assert base is not None
    assert not base["claimed"]
    return error.message.split("there is no memory for ")[1].split(":")[0]


def test_a_create_without_memory_is_refused_and_works_later(
    host: Host, media: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    # Large pieces of memory go back to the system at once: none of a create is left for the next.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 << 10))
    options = {"segment_size_kib": 1024, "data_crc": True}
    storage = Storage(media, base_mib=256, cache_mib=256, options=options)
    client = storage.client(seed)
    other = Storage(media / "other", base_mib=16)
    other.folder.mkdir()
    other_client = other.client(seed)
    bdevs = [storage.aio_base(), other.aio_base(OTHER)]
    session = start_session(host, bdevs, OTHER, cores=2)
    app = session.app
    session.rpc.bdev_wait_for_examine()

    # A new cache, and then one that has data.
    wanted_for = {check_refused(app, storage, size_mib) for size_mib in ROOMS_MIB}
    assert len(wanted_for) > 1, wanted_for
    assert_intact(other_client.write(session.url, seconds=0.5))
    app.rpc.bdev_pcache_create(**storage.cache_params())
    assert_intact(client.write(IscsiTarget(app, CACHE, 2).url, writes=300, seconds=20))
    app.rpc.bdev_pcache_delete(name=CACHE)

    for size_mib in ROOMS_MIB:
        check_refused(app, storage, size_mib)
    with room_for(app, ROOMS_MIB[0]):
        assert_intact(other_client.write(session.url, seconds=0.5))
    app.rpc.bdev_pcache_create(**storage.cache_params())
    wait_online(app.rpc, CACHE)
    assert_intact(client.verify(IscsiTarget(app, CACHE, 3).url))
    drain_and_verify(app.rpc, client, storage)
    assert_intact(other_client.verify(session.url))
    app.stop()
