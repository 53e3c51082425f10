# SPDX-License-Identifier: BSD-3-Clause
"""The order in which the storage client issued its writes and saw them acknowledged (test/client/history.h),
and whether a copy of the base is a state of one moment of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

# struct history_record; what a sector of the client begins with: magic, block, version.
_RECORD = struct.Struct("<4Q")
_SECTOR = struct.Struct("<3Q")
_SECTOR_SIZE = 512
_ISSUED, _ACKED = 1, 2
_ZERO_FLAG = 1 << 63
_NEVER = 1 << 62
# What is on the base before the first write.
_FIRST_VERSION = 1


@dataclass
class _Write:
    version: int
    lba: int
    len_blocks: int
    issued: int
    acked: int = _NEVER

    @property
    def content(self) -> int:
        """The version that its blocks show: zeroes show none."""
        return 0 if self.version & _ZERO_FLAG else self.version


class History:
    """The file that the client appends to with `--history`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def now(self) -> int:
        """The number of events so far."""
        return self.path.stat().st_size // _RECORD.size if self.path.exists() else 0

    def _writes(self) -> list[_Write]:
        writes: dict[int, _Write] = {}
        for number, (event, version, lba, len_blocks) in enumerate(
            _RECORD.iter_unpack(self.path.read_bytes())
        ):
            if event == _ISSUED:
                writes[version] = _Write(version, lba, len_blocks, number)
            else:
                assert event == _ACKED
                writes[version].acked = number
        return list(writes.values())

    def complaints(self, image: Path, block_size: int, *, since: int, until: int) -> list[str]:
        """Why the image is no exact cut of a moment from `since` to `until` (as `now` told them).

        In a cut, every write of which something is there is there as a whole, and so is every write that was
        acknowledged before it was issued, or before `since`, unless a newer one of the same block is; and
        nothing is there that was issued at or after `until`. The client has no two writes of one block under
        way, so those of a block have one order.
        """
        first = _Write(_FIRST_VERSION, 0, image.stat().st_size // block_size, -1, -1)
        history: dict[int, list[_Write]] = {}
        for write in self._writes():
            for lba in range(write.lba, write.lba + write.len_blocks):
                history.setdefault(lba, [first]).append(write)
        complaints = []
        found: dict[int, tuple[int, int]] = {}
        demanded = since
        present: set[int] = set()
        for lba, content in enumerate(_contents(image, block_size)):
            writes = history.get(lba, [first])
            places = [place for place, write in enumerate(writes) if write.content == content]
            if not places:
                complaints.append(f"block {lba} holds {content}, which was not written there")
                continue
            oldest = writes[places[0]]
            demanded = max(demanded, oldest.issued)
            if len(places) == 1:
                present.add(oldest.version)
            if oldest.issued >= until:
                complaints.append(f"block {lba} holds a write that was issued after the hold began")
            found[lba] = (places[0], places[-1])
        for lba, (_, newest) in found.items():
            for write in history.get(lba, [first])[newest + 1 :]:
                if write.acked < demanded:
                    complaints.append(
                        f"block {lba} lacks a write acknowledged at {write.acked}, before {demanded}"
                    )
                elif write.version in present:
                    complaints.append(f"block {lba} lacks its part of the write issued at {write.issued}")
        return complaints


def _contents(image: Path, block_size: int) -> list[int]:
    """The version that each block shows; 0: zeroes; -1: nothing of the client's."""
    data = image.read_bytes()
    zeroes = bytes(block_size)
    contents = []
    for start in range(0, len(data), block_size):
        block = data[start : start + block_size]
        if block == zeroes:
            contents.append(0)
            continue
        sectors = [_SECTOR.unpack_from(block, at) for at in range(0, block_size, _SECTOR_SIZE)]
        same = len(set(sectors)) == 1 and sectors[0][1] == start // block_size
        contents.append(sectors[0][2] if same else -1)
    return contents
