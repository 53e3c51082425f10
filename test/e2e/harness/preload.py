# SPDX-License-Identifier: BSD-3-Clause
"""Libraries that change what the module finds, or tell what it does (test/preload)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .host import App
from .paths import ROOT


def build_preload(name: str, folder: Path) -> Path:
    """Compiles one of them, for applications that are started with it as `before_module`."""
    library = folder / f"{name}.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "test/preload" / f"{name}.c"
    subprocess.run(["cc", *flags, "-o", library, source, "-ldl"], check=True)
    return library


def shortages(app: App, what: str) -> int:
    """How often the module found something short, at the least, in an application with `shortage`:
    "background" and "channels" have waited for a request of SPDK, "refused" could not, and tried again."""
    counts = re.findall(rf"shortage: {what} (\d+)", app.log())
    return int(counts[-1]) if counts else 0
