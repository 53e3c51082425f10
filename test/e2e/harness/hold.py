# SPDX-License-Identifier: BSD-3-Clause
"""Unmapping a large cache device, or making its page tables, takes as long as a test wants."""

from __future__ import annotations

import re
from pathlib import Path

from .host import App
from .preload import build_preload


class Hold:
    """Holds calls of applications that are started with `library` before the module, in `environment`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.library = build_preload("hold", folder)
        self.environment = {"PCACHE_HOLD": str(folder)}

    def hold(self, call: str) -> None:
        """Whoever makes this call ("munmap", "madvise", "spdk_mem_register" ...) from now on waits."""
        (self._folder / call).touch()

    def let_go(self, call: str) -> None:
        """And goes on."""
        (self._folder / call).unlink(missing_ok=True)

    def threads(self, app: App, call: str, size_bytes: int) -> list[str]:
        """Who has made this call, or waits in it."""
        return re.findall(rf"hold: {call} of {size_bytes} bytes, on (\S+)", app.log())
