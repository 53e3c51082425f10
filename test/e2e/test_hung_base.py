# SPDX-License-Identifier: BSD-3-Clause
"""A base that keeps what it is asked for keeps no cache from its end, nor the application."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import AckClient, Host, NvmfTarget, wait_until
from harness.ackclient import EXIT_DISCONNECTED, EXIT_TARGET_ERROR
from harness.scenario import (
    CACHE,
    SICK,
    Session,
    Storage,
    assert_intact,
    base_read_bytes,
    cache_info,
    cache_state,
    drain_and_verify,
    start_session,
)

# SPDK's error bdev keeps what it is told to until it is reset.
KEEPS = {"name": SICK, "error_type": "pending", "num": 1000}
RESET = "and the cache is being closed: the base is reset"


def delete(session: Session) -> None:
    assert session.rpc.bdev_pcache_delete(name=CACHE) is True


def delete_base(session: Session) -> None:
    session.rpc.bdev_error_delete(name=SICK)
    wait_until(lambda: cache_state(session.rpc) == "pending", "the cache waits for its base")


def end_application(session: Session) -> None:
    session.app.stop()


def assert_all_there(host: Host, storage: Storage, client: AckClient) -> None:
    """At the next start, over a base that is well."""
    session = start_session(host, storage.sick_base())
    assert_intact(client.verify(session.url))
    drain_and_verify(session.rpc, client, storage)
    session.app.stop()


@pytest.mark.parametrize(
    ("end", "io_type"), [(delete, "write"), (delete_base, "flush"), (end_application, "write")]
)
def test_cache_ends_although_its_base_keeps_what_is_written_back(
    host: Host, media: Path, seed: int, end: Callable[[Session], None], io_type: str
):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base())
    session.rpc.bdev_error_inject_error(io_type=io_type, **KEEPS)
    assert_intact(client.write(session.url, writes=500, io_bytes="512:16384", seconds=20))
    session.rpc.bdev_pcache_flush_start(name=CACHE)
    wait_until(lambda: cache_info(session.rpc)["base_operations"] > 0, "something is written back")
    end(session)
    assert RESET in session.app.log()
    if end is not end_application:
        session.app.stop()
    assert_all_there(host, storage, client)


def test_cache_ends_although_its_base_keeps_reads_of_its_users(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    session = start_session(host, storage.sick_base(), target=NvmfTarget)
    assert_intact(client.write(session.url, writes=500, seconds=20))
    session.rpc.bdev_error_inject_error(io_type="read", **KEEPS)
    before = base_read_bytes(session.rpc)
    with ThreadPoolExecutor() as pool:
        # Most blocks were never written.
        verified = pool.submit(client.verify, session.url)
        wait_until(lambda: base_read_bytes(session.rpc) > before, "the base is read")
        delete(session)
        assert verified.result().exit_code in (EXIT_TARGET_ERROR, EXIT_DISCONNECTED)
    session.app.stop()
    assert_all_there(host, storage, client)
