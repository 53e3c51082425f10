# SPDX-License-Identifier: BSD-3-Clause
"""SPDK's own acceptance test of a bdev, as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Host
from harness.scenario import CACHE, Storage


@pytest.mark.parametrize("block_size", [512, 4096])
def test_all_cases(host: Host, need_app, media: Path, block_size: int):
    need_app("bdevio")
    storage = Storage(media, block_size=block_size)
    bdevs = [storage.malloc_base(), storage.cache()]
    # It wants three reactors; -w: wait for the RPC.
    app = host.start("bdevio", bdevs=bdevs, cores=3, arguments=["-w"])
    failures = app.rpc.perform_tests(name=CACHE)
    assert failures == 0, app.log_tail(60)
    app.stop()
    assert "...passed" in app.log()
    assert "FAILED" not in app.log(), app.log_tail(60)
