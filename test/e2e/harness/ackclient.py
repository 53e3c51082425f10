# SPDX-License-Identifier: BSD-3-Clause
"""The storage client in another process (test/client), and its journal."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .host import _die_with_parent
from .paths import ROOT

_SOURCES = ROOT / "test/client"
_BINARY = ROOT / "target/client/ackclient"

# struct journal_header of ackclient.c, up to writes_acked.
_HEADER = struct.Struct("<7Q")

EXIT_DONE = 0
EXIT_VIOLATION = 1
EXIT_TARGET_ERROR = 3
EXIT_DISCONNECTED = 4


def build() -> Path:
    """Compiles the client if its sources are newer."""
    changed = max(file.stat().st_mtime for file in _SOURCES.iterdir())
    if not _BINARY.exists() or _BINARY.stat().st_mtime < changed:
        _BINARY.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-g", "-Wall", "-Wextra", "-Werror"]
        sources = sorted(_SOURCES.glob("*.c"))
        subprocess.run(["cc", *flags, "-o", _BINARY, *sources, "-liscsi"], check=True)
    return _BINARY


@dataclass(frozen=True)
class ClientResult:
    """How a run of the client ended."""

    exit_code: int
    summary: dict[str, Any]
    complaints: str


class AckClient:
    """One journal, and the runs of the client on it."""

    def __init__(self, journal: Path, *, block_size: int, block_count: int, seed: int = 1) -> None:
        self.journal = journal
        self._binary = build()
        self._geometry = ["--block-size", str(block_size), "--block-count", str(block_count)]
        self._geometry += ["--seed", str(seed)]
        self._writer: subprocess.Popen | None = None

    def create(self, image: Path | None = None) -> None:
        """Makes the journal; with `image`, also fills that file with content that it knows."""
        options = [] if image is None else ["--file", str(image)]
        result = self._run("init", *self._geometry, *options)
        assert result.exit_code == EXIT_DONE, result.complaints

    def start_writing(self, url: str, **options: Any) -> None:
        """Writes in the background: seconds, writes, depth, io_bytes ("512:131072"), aligned..."""
        assert self._writer is None
        self._writer = self._spawn("write", "--url", url, *_to_arguments(options))

    def finish_writing(self, timeout_s: float = 120.0) -> ClientResult:
        """Waits for the end of the writes."""
        assert self._writer is not None
        writer, self._writer = self._writer, None
        return _collect(writer, timeout_s)

    def write(self, url: str, **options: Any) -> ClientResult:
        """Writes, and waits for the end."""
        self.start_writing(url, **options)
        return self.finish_writing()

    def verify(self, url: str, **options: Any) -> ClientResult:
        """Reads everything from the target and judges it: atomic_bytes."""
        return self._run("verify", "--url", url, *_to_arguments(options))

    def verify_file(self, image: Path) -> ClientResult:
        """Judges a raw image; nothing of SPDK or pcache takes part."""
        return self._run("verify-file", "--file", str(image))

    def writes_acked(self) -> int:
        """Acknowledged so far, read from the journal while the client runs."""
        return self._header()[6]

    def writes_issued(self) -> int:
        """Sent so far: those of which nobody knows how they ended are among them."""
        return self._header()[5]

    def _header(self) -> tuple[int, ...]:
        with self.journal.open("rb") as file:
            return _HEADER.unpack(file.read(_HEADER.size))

    def end(self) -> None:
        """Kills a run that still goes on."""
        if self._writer is not None:
            self._writer.send_signal(signal.SIGKILL)
            self._writer.communicate()
            self._writer = None

    def _run(self, mode: str, *arguments: str) -> ClientResult:
        return _collect(self._spawn(mode, *arguments), timeout_s=180.0)

    def _spawn(self, mode: str, *arguments: str) -> subprocess.Popen:
        return _spawn(self._binary, mode, "--journal", str(self.journal), *arguments)


def replay(url: str, commands: Path, timeout_s: float) -> ClientResult:
    """Sends the requests of a file ("read LBA LEN", "write LBA LEN") to a target, one by one."""
    return _collect(_spawn(build(), "replay", "--url", url, "--file", str(commands)), timeout_s)


def _spawn(binary: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [binary, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_die_with_parent,
    )


def _to_arguments(options: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in options.items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments.append(str(value))
    return arguments


def _collect(process: subprocess.Popen, timeout_s: float) -> ClientResult:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    summary = json.loads(out) if out.strip() else {}
    return ClientResult(process.returncode, summary, err)
