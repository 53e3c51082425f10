# SPDX-License-Identifier: BSD-3-Clause
"""Small things: waiting, ports, cores."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(probe: Callable[[], T], what: str, timeout_s: float = 30.0, *, pause_s: float = 0.02) -> T:
    """Calls `probe` until it returns something true, and returns that."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = probe()
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(pause_s)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def core_mask(count: int, first: int = 0) -> str:
    """The argument of -m for `count` reactors, also where the machine has fewer processors.

    A reactor is a thread of its own; with --lcores two of them can share a processor, slowly.
    """
    cpus = sorted(os.sched_getaffinity(0))
    pairs = ",".join(f"{i}@{cpus[(first + i) % len(cpus)]}" for i in range(count))
    return f"--lcores={pairs}"
