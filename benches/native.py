# SPDX-License-Identifier: BSD-3-Clause
"""What is measured without SPDK: the copy limit, the index's memory, instructions (benches/parts.rs), and how
programs of that kind are built and run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from harness import ROOT

# Counts of requests of a profiled run, by kind; their difference is free of what the start costs.
_COUNTS = {
    # Batches of write-back take ten thousand.
    "write_busy": (20_000, 120_000),
    # The first goes around the base, the second not around the cache.
    "write_128k": (1_050, 1_300),
}
_COUNTS_OF_OTHERS = (5_000, 15_000)
# So large that nothing is written back without need.
_PROFILED_CACHE_MIB = 256


# Three fifths of it are filled: nothing is reclaimed.
_INDEX_CACHE_MIB = 512
_INDEX_PAGES = _INDEX_CACHE_MIB * 256 * 3 // 5


class NativeFailed(Exception):
    """The program did not run."""


def build(name: str) -> str:
    """The program of benches/`name`.rs; building it again costs next to nothing."""
    command = ["cargo", "bench", "--quiet", "--features", "heap", "--bench", name, "--no-run"]
    built = subprocess.run(
        [*command, "--message-format", "json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    programs = [message["executable"] for message in messages if message.get("executable")]
    return programs[-1]


def run(command: list[str]) -> Any:
    """Runs a program; the JSON that it prints."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise NativeFailed(f"{' '.join(command)}: status {ended.returncode}\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout)


class Parts:
    """The program, built once."""

    def __init__(self) -> None:
        self._program = build("parts")

    def run(self, mode: str, file: Path, size_mib: int, *rest: object, under: list[str] | None = None) -> Any:
        """One mode of it; the JSON that it prints."""
        arguments = [mode, str(file), str(size_mib), *(str(argument) for argument in rest)]
        return run([*(under or []), self._program, *arguments])

    def index(self, file: Path, kind: str) -> dict[str, float]:
        """DRAM of the index: for each cached page, and of the table as such for each GiB of cache."""
        empty, full = (self.run("index", file, _INDEX_CACHE_MIB, kind, pages) for pages in (1, _INDEX_PAGES))
        grown_bytes = full["resident_bytes"] - empty["resident_bytes"]
        return {
            "bytes_per_page": grown_bytes / (full["pages"] - empty["pages"]),
            "table_mib_per_gib": full["table_bytes"] / (_INDEX_CACHE_MIB << 10),
        }

    def instructions(self, file: Path, kind: str, depth: int) -> float:
        """Instructions of the engine for one request, by valgrind."""
        counts = _COUNTS.get(kind, _COUNTS_OF_OTHERS)
        few, many = (self._count(file, kind, depth, count) for count in counts)
        return (many - few) / (counts[1] - counts[0])

    def _count(self, file: Path, kind: str, depth: int, requests: int) -> int:
        out = file.with_suffix(".callgrind")
        under = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        try:
            self.run("requests", file, _PROFILED_CACHE_MIB, kind, depth, requests, under=under)
            totals = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
        finally:
            out.unlink(missing_ok=True)
        if totals is None:
            raise NativeFailed("valgrind counted nothing")
        return int(totals[1])


def have_valgrind() -> bool:
    """Can instructions of the engine be counted?"""
    return shutil.which("valgrind") is not None


class Perf:
    """Counts an event of a process in the middle of a workload: perf, where the machine lets it."""

    def __init__(self, event: str = "instructions:u") -> None:
        self._event = event
        self._process: subprocess.Popen[str] | None = None

    @property
    def works(self) -> bool:
        """Virtual machines often have no counters."""
        if shutil.which("perf") is None:
            return False
        tried = subprocess.run([*self._command(), "true"], capture_output=True, text=True, check=False)
        return tried.returncode == 0 and self._rate(tried.stderr) is not None

    def _command(self) -> list[str]:
        return ["perf", "stat", "-x", ",", "-e", self._event]

    def start(self, pid: int, span_s: float) -> None:
        """To be called right before a workload of so many seconds; it is counted from 0.3 to 0.8 of them."""
        window = ["-D", str(round(300 * span_s)), "-p", str(pid), "sleep", str(0.8 * span_s)]
        self._process = subprocess.Popen([*self._command(), *window], stderr=subprocess.PIPE, text=True)

    def rate(self) -> float:
        """How often it happened in each second of a core."""
        assert self._process is not None
        _, text = self._process.communicate(timeout=10)
        rate = self._rate(text)
        if rate is None:
            raise NativeFailed(f"perf counted nothing:\n{text}")
        return rate

    def _rate(self, text: str) -> float | None:
        # Value, unit, event, for how many nanoseconds it was counted, ...
        for line in text.splitlines():
            fields = line.split(",")
            if len(fields) > 3 and fields[2] == self._event and fields[0].replace(".", "").isdigit():
                return float(fields[0]) / max(int(fields[3]), 1) * 1e9
        return None
