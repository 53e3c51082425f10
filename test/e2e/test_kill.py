# SPDX-License-Identifier: BSD-3-Clause
"""SIGKILL at any moment loses nothing that was acknowledged, and tears no write."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness import AckClient, Host, IscsiTarget, NvmfTarget, wait_until
from harness.ackclient import EXIT_DISCONNECTED
from harness.scenario import (
    BASE,
    CACHE,
    FOR_EVER,
    SICK,
    Session,
    Storage,
    assert_intact,
    cache_stats,
    drain,
    make_sick,
    start_session,
)

# Rounds before which the application is killed while it starts, that is within recovery or before.
START_KILL_SHARE = 0.3
# What a new cache logs just before and just after recovery.
BEFORE_RECOVERY = "stored to with"
AFTER_RECOVERY = f"in front of {SICK}"
ROUNDS_MIN = 4


@dataclass(frozen=True)
class Variant:
    """One way to run the loop. The cache is small, so that it is written back and reclaimed all the time."""

    name: str
    target: type[IscsiTarget | NvmfTarget]
    block_size: int
    options: dict[str, Any]
    # The largest write that reaches the cache in one piece and is promised atomic: a quarter of a segment;
    # 64 KiB over iSCSI, 128 KiB over NVMe/TCP.
    atomic_bytes: int = 64 << 10
    mixture: dict[str, Any] = field(default_factory=dict)


_FUA_AND_ZEROES = {"fua_percent": 6, "zero_percent": 4, "flush_percent": 4}

VARIANTS = [
    Variant(
        "nvme-512-strict",
        NvmfTarget,
        512,
        {"segment_size_kib": 1024, "writeback_order": "strict"},
        atomic_bytes=128 << 10,
        mixture=_FUA_AND_ZEROES,
    ),
    Variant(
        "nvme-4096-crc-relaxed",
        NvmfTarget,
        4096,
        {"segment_size_kib": 512, "data_crc": True, "writeback_order": "relaxed"},
        atomic_bytes=128 << 10,
        mixture=_FUA_AND_ZEROES,
    ),
    Variant(
        "iscsi-512-crc-strict",
        IscsiTarget,
        512,
        {"segment_size_kib": 256, "data_crc": True, "writeback_order": "strict"},
    ),
    Variant(
        "iscsi-4096-relaxed",
        IscsiTarget,
        4096,
        {"segment_size_kib": 1024, "writeback_order": "relaxed"},
    ),
]


class KillLoop:
    """Kills an application again and again, at instants drawn from a seed."""

    def __init__(self, host: Host, media: Path, variant: Variant, seed: int) -> None:
        self.variant = variant
        self.storage = Storage(
            media,
            block_size=variant.block_size,
            base_mib=48,
            cache_mib=16,
            options=variant.options,
        )
        self.client = self.storage.client(seed)
        self.stats: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self._host = host
        self._dice = random.Random(f"{seed} {variant.name}")
        self._start_s = 1.0

    def start(self, cores: int) -> Session:
        """Recovers, and checks all that is there."""
        started = time.monotonic()
        bdevs = self.storage.sick_base()
        session = start_session(self._host, bdevs, target=self.variant.target, cores=cores)
        self._start_s = time.monotonic() - started
        assert_intact(self.client.verify(session.url, atomic_bytes=self.variant.atomic_bytes))
        return session

    def kill_while_starting(self) -> None:
        """Somewhere between the first instruction and a while after recovery; or within recovery."""
        app = self._host.launch("spdk_tgt", bdevs=self.storage.sick_base())
        if self._dice.random() < 0.5:
            time.sleep(self._dice.uniform(0, 1.2) * self._start_s)
        else:
            wait_until(lambda: BEFORE_RECOVERY in app.log(), "recovery begins", pause_s=0.0002)
            time.sleep(self._dice.uniform(0, 0.004))
        app.kill()
        log = app.log()
        within = BEFORE_RECOVERY in log and AFTER_RECOVERY not in log
        self.kills["within recovery" if within else "at the start"] += 1

    def kill_under_load(self, cores: int) -> None:
        """Recover, verify, write on, kill."""
        dice = self._dice
        session = self.start(cores)
        options = {"seconds": 60, "depth": dice.choice([1, 16, 64]), **self.variant.mixture}
        acked_before = self.client.writes_acked()
        self.client.start_writing(session.url, **options)
        wait_until(lambda: self.client.writes_acked() > acked_before, "the first write", pause_s=0.001)
        time.sleep(dice.uniform(0, 1.0))
        what = dice.choice(["under load", "under load", "while draining", "while the base fails"])
        if what == "while draining":
            session.rpc.bdev_pcache_flush_start(name=CACHE)
            time.sleep(dice.uniform(0, 0.1))
        elif what == "while the base fails":
            make_sick(session.rpc, dice.choice(["write", "flush"]), dice.choice([3, 30, FOR_EVER]))
            time.sleep(dice.uniform(0, 0.4))
        self.stats.update(cache_stats(session.rpc))
        # The last of the statistics is not the last that happens.
        time.sleep(dice.uniform(0, 0.01))
        session.app.kill()
        self.kills[what] += 1
        result = self.client.finish_writing()
        assert result.exit_code == EXIT_DISCONNECTED, f"{result.summary}\n{result.complaints}"

    def round(self, number: int) -> None:
        """At least one kill."""
        if self._dice.random() < START_KILL_SHARE:
            self.kill_while_starting()
        self.kill_under_load(cores=1 + number % 2)

    def assert_busy(self) -> None:
        """A loop in which nothing happened would prove nothing."""
        kinds = ["requests.wr_total", "requests.unmaps", "requests.flushes"]
        kinds += ["writeback.batches", "gc.segments_reclaimed"]
        if self.variant.mixture:
            kinds += ["requests.wr_fua", "requests.write_zeroes"]
        idle = [kind for kind in kinds if self.stats[kind] == 0]
        assert not idle, f"these never happened: {idle}; {dict(self.stats)}"
        assert self.stats["errors.cache_volume_crc"] == self.stats["errors.requests"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_kill_loop(
    request: pytest.FixtureRequest,
    host: Host,
    media: Path,
    seed: int,
    ended_client: list[AckClient],
    variant: Variant,
):
    loop = KillLoop(host, media, variant, seed)
    ended_client.append(loop.client)
    rounds = max(ROUNDS_MIN, request.config.getoption("--kill-rounds") // len(VARIANTS))
    started = time.monotonic()
    for number in range(rounds):
        loop.round(number)
        host.forget_ended()
        print(f"round {number + 1} of {rounds}: {loop.client.writes_acked()} writes acknowledged, none lost")
    took_s = time.monotonic() - started
    print(f"{dict(loop.kills)} in {took_s:.0f} s; {dict(loop.stats)}")
    loop.assert_busy()

    session = loop.start(cores=1)
    drain(session.rpc)
    session.rpc.bdev_pcache_delete(name=CACHE)
    session.app.stop()
    assert_intact(loop.client.verify_file(loop.storage.base_file))


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
