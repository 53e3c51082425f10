# SPDX-License-Identifier: BSD-3-Clause
"""Hugepages, if this machine has or grants them; else ordinary memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PAGE_MIB = 2
# What one application takes with the small iSCSI pools of `Host` and a modest malloc bdev; two
# or three run at a time.
APP_MIB = 768
APP_COUNT = 3
# Reserving must leave the machine this much.
_SPARE_MIB = 4096
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_COUNT = _POOL / "nr_hugepages"


def meminfo_mib(key: str) -> int:
    """A line of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) // 1024
    return 0


def join_free_memory() -> None:
    """Gives back what only speeds up files, and moves what lies scattered, so that there are hugepages:
    those that are reserved, and those that the kernel gives to a tmpfs. Where that is not allowed, nothing
    changes."""
    os.sync()
    for knob in ("drop_caches", "compact_memory"):
        with contextlib.suppress(OSError):
            (Path("/proc/sys/vm") / knob).write_text("1")


def _reserved() -> int:
    return int(_COUNT.read_text())


def _reserve_more(size_mib: int) -> int | None:
    """Asks for more; the kernel gives what it has. Tells how many pages there were; None: not allowed."""
    before = _reserved()
    try:
        _COUNT.write_text(str(before + size_mib // _PAGE_MIB + 1))
    except OSError:
        return None
    return before


def _existing_mount() -> Path | None:
    """Where 2 MiB hugepages are mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "hugetlbfs" and "pagesize=1024M" not in options:
            return Path(mount)
    return None


class Hugepages:
    """The machine's hugepages; enough for `app_count` applications of `app_mib` each are reserved."""

    def __init__(self, allowed: bool, app_mib: int = APP_MIB, app_count: int = APP_COUNT) -> None:
        self._app_mib = app_mib
        self._wanted_mib = app_mib * app_count
        self.mount: Path | None = None
        self._own_mount: Path | None = None
        self._reserved_before: int | None = None
        if allowed and _POOL.is_dir():
            self.mount = _existing_mount() or self._mount()
        if self.mount is not None:
            self._reserve()

    def free_mib(self) -> int:
        """What is free now."""
        if self.mount is None:
            return 0
        return int((_POOL / "free_hugepages").read_text()) * _PAGE_MIB

    def _mount(self) -> Path | None:
        folder = Path(tempfile.mkdtemp(prefix="pcache-huge-"))
        command = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            folder.rmdir()
            return None
        self._own_mount = folder
        return folder

    def _reserve(self) -> None:
        missing_mib = self._wanted_mib - self.free_mib()
        if missing_mib <= 0 or meminfo_mib("MemAvailable") < missing_mib + _SPARE_MIB:
            return
        join_free_memory()
        self._reserved_before = _reserve_more(missing_mib)

    @contextlib.contextmanager
    def more(self, size_mib: int) -> Iterator[Path | None]:
        """A folder with room for files of so many MiB besides, until the end; None: there is no room."""
        if self.mount is None or meminfo_mib("MemAvailable") < size_mib:
            yield None
            return
        before = _reserve_more(size_mib)
        if before is None:
            yield None
            return
        try:
            yield self.mount if _reserved() >= before + size_mib // _PAGE_MIB else None
        finally:
            _COUNT.write_text(str(before))

    def release(self) -> None:
        """Gives back what was reserved and mounted here."""
        if self._own_mount is not None:
            subprocess.run(["umount", str(self._own_mount)], check=False)
            self._own_mount.rmdir()
            self._own_mount = None
        if self._reserved_before is not None:
            _COUNT.write_text(str(self._reserved_before))
            self._reserved_before = None

    def arguments(self) -> list[str]:
        """The memory options for one more application."""
        if self.free_mib() >= self._app_mib:
            # Unlinked at once: nothing to clean up after a SIGKILL.
            return ["-s", "256", "--huge-unlink", "--huge-dir", str(self.mount)]
        return ["--no-huge", "-s", str(max(1024, self._app_mib))]

    def remove_leftovers(self, pid: int) -> None:
        """Deletes the files that a killed application left: hugepages, and its trace buffer."""
        leftovers = list(Path("/dev/shm").glob(f"*_trace.pid{pid}"))
        if self.mount is not None:
            leftovers += self.mount.glob(f"spdk_pid{pid}map_*")
        for file in leftovers:
            file.unlink(missing_ok=True)
