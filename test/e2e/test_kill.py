# SPDX-License-Identifier: BSD-3-Clause
"""SIGKILL at any moment loses nothing that was acknowledged, and tears no write."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from harness import AckClient, Host
from harness.ackclient import EXIT_DISCONNECTED
from harness.scenario import BASE, CACHE, Storage, assert_intact, drain, start_session
from harness.targets import IscsiTarget

# Rounds in which the application is killed while it starts, that is within recovery.
START_KILL_SHARE = 0.3


def start_and_kill_early(host: Host, storage: Storage, dice: random.Random) -> None:
    """Somewhere between the first instruction and a while after recovery."""
    app = host.launch("spdk_tgt", bdevs=[storage.aio_base(), storage.cache()])
    time.sleep(dice.uniform(0.1, 0.8))
    app.kill()


def write_and_kill(host: Host, storage: Storage, client: AckClient, dice: random.Random, cores: int) -> int:
    """One round: recover, verify, write on, kill. Returns what was acknowledged meanwhile."""
    session = start_session(host, [storage.aio_base(), storage.cache()], cores=cores)
    assert_intact(client.verify(session.url))
    before = client.writes_acked()
    client.start_writing(session.url, seconds=60, depth=dice.choice([1, 16, 64]))
    time.sleep(dice.uniform(0.05, 1.0))
    session.app.kill()
    result = client.finish_writing()
    assert result.exit_code == EXIT_DISCONNECTED, f"{result.summary}\n{result.complaints}"
    return client.writes_acked() - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block_size", "options"),
    [
        (512, {"segment_size_kib": 1024}),
        (4096, {"segment_size_kib": 256, "data_crc": True, "writeback_order": "relaxed"}),
    ],
)
def test_kill_loop(
    request: pytest.FixtureRequest,
    host: Host,
    media: Path,
    seed: int,
    ended_client: list[AckClient],
    block_size: int,
    options: dict,
):
    storage = Storage(media, block_size=block_size, options=options)
    client = storage.client(seed)
    ended_client.append(client)
    dice = random.Random(seed)
    rounds = (request.config.getoption("--kill-rounds") + 1) // 2
    acked = 0
    for round_number in range(rounds):
        if dice.random() < START_KILL_SHARE:
            start_and_kill_early(host, storage, dice)
        acked += write_and_kill(host, storage, client, dice, cores=1 + round_number % 2)
        print(f"round {round_number + 1} of {rounds}: {acked} writes acknowledged, none lost")
    assert acked > 0

    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    drain(session.rpc)
    session.rpc.bdev_pcache_delete(name=CACHE)
    session.app.stop()
    assert_intact(client.verify_file(storage.base_file))


def test_killed_before_the_first_write(host: Host, media: Path):
    """A cache that was just formatted opens again."""
    storage = Storage(media)
    client = storage.client()
    for _ in range(3):
        session = start_session(host, [storage.aio_base(), storage.cache()])
        session.app.kill()
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_killed_while_draining(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    for _ in range(3):
        session = start_session(host, [storage.aio_base(), storage.cache()])
        assert_intact(client.write(session.url, seconds=1))
        session.rpc.bdev_pcache_flush_start(name=CACHE)
        session.app.kill()
        session = start_session(host, [storage.aio_base(), storage.cache()])
        assert_intact(client.verify(session.url))
        session.app.kill()


def test_restart_with_other_core_masks(host: Host, media: Path, seed: int):
    """What two cores have written opens with one, and the other way round."""
    storage = Storage(media)
    client = storage.client(seed)
    for cores, first_core in ((1, 0), (2, 0), (1, 1), (2, 1)):
        bdevs = [storage.aio_base(), storage.cache()]
        session = start_session(host, bdevs, cores=cores, first_core=first_core)
        assert_intact(client.verify(session.url))
        assert_intact(client.write(session.url, seconds=1))
        session.app.stop()
    session = start_session(host, [storage.aio_base(), storage.cache()])
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_without_hugepages(host: Host, media: Path, seed: int):
    storage = Storage(media)
    client = storage.client(seed)
    bdevs = [storage.aio_base(), storage.cache()]
    session = start_session(host, bdevs, hugepages=False)
    client.start_writing(session.url, seconds=60)
    time.sleep(1)
    session.app.kill()
    client.finish_writing()
    session = start_session(host, bdevs, hugepages=False)
    assert_intact(client.verify(session.url))
    session.app.stop()


def test_cache_created_by_rpc_after_a_kill(host: Host, media: Path, seed: int):
    """The same as with a configuration file, with the RPC."""
    storage = Storage(media)
    client = storage.client(seed)
    for _ in range(2):
        app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
        assert app.rpc.bdev_pcache_create(**storage.cache_params()) == CACHE
        target = IscsiTarget(app, CACHE)
        assert_intact(client.verify(target.url))
        client.start_writing(target.url, seconds=60)
        time.sleep(0.5)
        app.kill()
        client.finish_writing()
    app = host.start("spdk_tgt", bdevs=[storage.aio_base()])
    info = {bdev["name"]: bdev for bdev in app.rpc.bdev_get_bdevs()}
    assert not info[BASE]["claimed"]
    app.stop()
