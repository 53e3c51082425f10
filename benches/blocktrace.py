# SPDX-License-Identifier: BSD-3-Clause
"""The requests of a recorded block device, from a file with a line for each that is checked before use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECTOR_SIZE = 512
PAGE_SIZE = 4096
HEADER = "version,time,op,size,lbn"
# SCSI: READ(10), WRITE(10).
_OPS = {"28": "read", "2a": "write"}
# Base devices are thin files, and this much of one can be addressed with the smallest cache.
_BASE_SIZE_MAX = 1 << 46
# What a target over NVMe/TCP takes in a command, unless told; also what a cache of any size takes.
_COMMAND_SIZE_MAX = 128 << 10
# The base is a little larger than what is used of it.
_BASE_SIZE_UNIT = 1 << 20


class BadTrace(Exception):
    """The file is not a trace; says where, and what would be right."""


@dataclass(frozen=True)
class Request:
    """`start` and `size` are in bytes."""

    kind: str
    start: int
    size: int

    @property
    def pages(self) -> range:
        """The pages of 4 KiB that it touches."""
        return range(self.start // PAGE_SIZE, (self.start + self.size - 1) // PAGE_SIZE + 1)

    def commands(self) -> Iterator[tuple[int, int]]:
        """First block and blocks of each command that it takes.

        A cut lies between two pages, so that no page counts twice."""
        start, end = self.start, self.start + self.size
        while start < end:
            limit = start + _COMMAND_SIZE_MAX
            stop = end if end <= limit else limit - limit % PAGE_SIZE
            yield start // SECTOR_SIZE, (stop - start) // SECTOR_SIZE
            start = stop


class Trace:
    """All requests, in the order in which they were recorded; when each was made plays no part."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        end = max(request.start + request.size for request in requests)
        base_size = -(-end // _BASE_SIZE_UNIT) * _BASE_SIZE_UNIT
        self.base_blocks = base_size // SECTOR_SIZE
        self.footprint = PAGE_SIZE * len({page for request in requests for page in request.pages})
        self.read_pages = sum(len(request.pages) for request in requests if request.kind == "read")
        self.write_bytes = sum(request.size for request in requests if request.kind == "write")

    def write_commands(self, path: Path) -> None:
        """For those who replay them: lines of kind, first block, blocks."""
        with path.open("w") as file:
            for request in self.requests:
                for lba, len_blocks in request.commands():
                    file.write(f"{request.kind} {lba} {len_blocks}\n")


def read_trace(path: Path) -> Trace:
    """Reads and checks the whole file."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"TRACE {path} cannot be read: {error}") from error
    if not lines or lines[0].strip() != HEADER:
        found = lines[0][:80] if lines else ""
        raise BadTrace(f"{path}:1: the first line must be '{HEADER}', not '{found}'")
    requests = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            requests.append(_parse(line))
        except ValueError as error:
            raise BadTrace(f"{path}:{number}: {error}") from None
    if not any(request.kind == "read" for request in requests):
        raise BadTrace(f"{path}: there is no read (op 28) in it, so there is no hit ratio")
    return Trace(requests)


def _parse(line: str) -> Request:
    values = [value.strip() for value in line.split(",")]
    names = HEADER.split(",")
    if len(values) != len(names):
        raise ValueError(f"'{line[:80]}' has {len(values)} values; it must have {len(names)}: {HEADER}")
    field = dict(zip(names, values, strict=True))
    kind = _OPS.get(field["op"].lower())
    if kind is None:
        raise ValueError(f"op is '{field['op']}'; it must be 28 (read) or 2a (write)")
    for name in ("version", "time"):
        _number(field, name)
    size, start = _number(field, "size"), _number(field, "lbn") * SECTOR_SIZE
    if size == 0 or size % SECTOR_SIZE != 0:
        raise ValueError(f"size is '{size}'; it must be a multiple of {SECTOR_SIZE} bytes, and not 0")
    if start + size > _BASE_SIZE_MAX:
        last = (_BASE_SIZE_MAX - size) // SECTOR_SIZE
        raise ValueError(
            f"lbn is '{field['lbn']}'; the base has {_BASE_SIZE_MAX >> 40} TiB at most, so with a size of "
            f"{size} bytes it must be at most {last}"
        )
    return Request(kind, start, size)


def _number(field: dict[str, str], name: str) -> int:
    text = field[name]
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} is '{text}'; it must be a number, 0 or greater, in decimal digits")
    return int(text)
