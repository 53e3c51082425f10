# SPDX-License-Identifier: BSD-3-Clause
"""What the module asks of the heap while an application runs."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

from .paths import MODULE
from .preload import build_preload

# `struct report` of test/preload/allocations.c.
_COUNTERS = struct.Struct("<4Q")
_TRACES_MAX = 16
_TRACE = struct.Struct("<24Q")
# Of a trace those frames are told that lie in the module and not in Rust's library, from the innermost on.
_FRAMES_TOLD = 8


class Allocations:
    """Counts in an application that is started with `library` before the module, in `environment`."""

    def __init__(self, folder: Path) -> None:
        self.library = build_preload("allocations", folder)
        path = folder / "allocations"
        path.write_bytes(bytes(_COUNTERS.size + _TRACES_MAX * _TRACE.size))
        self.environment = {"PCACHE_ALLOCATIONS": str(path)}
        with path.open("r+b") as file:
            self._report = mmap.mmap(file.fileno(), 0)

    def begin(self) -> None:
        """Counts from now on."""
        _COUNTERS.pack_into(self._report, 0, 1, 0, 0, 0)

    def end(self) -> tuple[int, int]:
        """Counts no more. How often the module has got memory, and has given some back."""
        counting, allocations, _, frees = _COUNTERS.unpack_from(self._report)
        assert counting == 1, "it was begun"
        struct.pack_into("<Q", self._report, 0, 0)
        return allocations, frees

    def origins(self) -> str:
        """Where the first allocations came from."""
        _, allocations, size_bytes, frees = _COUNTERS.unpack_from(self._report)
        told = [f"{allocations} allocations of {size_bytes} bytes, {frees} given back"]
        for number in range(min(allocations, _TRACES_MAX)):
            trace = _TRACE.unpack_from(self._report, _COUNTERS.size + number * _TRACE.size)
            # Where a call returns to is behind the call.
            places = [hex(place - 1) for place in trace if place != 0]
            told += ["--", *_lines_of_code(places)[:_FRAMES_TOLD]]
        return "\n".join(told)


def _lines_of_code(places: list[str]) -> list[str]:
    if shutil.which("addr2line") is None:
        return places
    command = ["addr2line", "-Cfip", "-e", str(MODULE), *places]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "/rustc/" not in line]
