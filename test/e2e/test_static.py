# SPDX-License-Identifier: BSD-3-Clause
"""The static library: an application with SPDK and pcache linked into it, by pkg-config alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import ROOT, Host
from harness.scenario import CACHE, Storage, cache_info, drain, wait_online

BUILD = ROOT / "test/static/build.sh"


@pytest.fixture(scope="module")
def linked_app(machine: Host) -> Path:
    tree = machine.spdk.tree
    if tree is None:
        pytest.skip("an installed SPDK: its static libraries may be elsewhere")
    binary = ROOT / "target/static/pcache_app"
    result = subprocess.run([BUILD, binary], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return binary


def test_application_with_pcache_linked_in(host: Host, media: Path, linked_app: Path):
    """It needs neither LD_PRELOAD nor the shared SPDK, and serves the same cache as those do."""
    needed = subprocess.run(["readelf", "-d", linked_app], capture_output=True, text=True, check=True)
    assert "libspdk" not in needed.stdout
    storage = Storage(media)
    bdevs = [storage.malloc_base(), storage.cache()]
    app = host.start(linked_app.name, binary=linked_app, bdevs=bdevs, preload=False)
    wait_online(app.rpc, CACHE)
    info = cache_info(app.rpc)
    assert info is not None
    assert info["state"] == "online"
    assert info["durability"] in ("process", "power")
    drain(app.rpc)
    assert app.rpc.bdev_pcache_delete(name=CACHE) is True
    app.stop()
