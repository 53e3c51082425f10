# SPDX-License-Identifier: BSD-3-Clause
"""The client that judges pcache notices what it is there to notice."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from harness import AckClient

BLOCK = 512
COUNT = 1024
SLOTS_OFFSET = 16 * 8
BLOCKS_OFFSET = SLOTS_OFFSET + 128 * 3 * 8


@pytest.fixture
def client(tmp_path: Path) -> AckClient:
    client = AckClient(tmp_path / "journal", block_size=BLOCK, block_count=COUNT)
    client.create(tmp_path / "image")
    return client


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def set_block(client: AckClient, lba: int, *, issued: int, acked: int) -> None:
    patch(client.journal, BLOCKS_OFFSET + 16 * lba, struct.pack("<2Q", issued, acked))


def set_slot(client: AckClient, version: int, lba: int, length: int) -> None:
    patch(client.journal, SLOTS_OFFSET, struct.pack("<3Q", version, lba, length))


def test_untouched_image_is_right(client: AckClient, image: Path):
    result = client.verify_file(image)
    assert result.exit_code == 0
    assert result.summary["blocks"] == COUNT


def test_changed_byte_is_garbage(client: AckClient, image: Path):
    patch(image, 7 * BLOCK + 300, b"\xff")
    result = client.verify_file(image)
    assert result.exit_code == 1
    assert result.summary["garbage_blocks"] == 1


def test_block_of_another_place_is_garbage(client: AckClient, image: Path):
    patch(image, 7 * BLOCK, image.read_bytes()[8 * BLOCK : 9 * BLOCK])
    result = client.verify_file(image)
    assert result.summary["garbage_blocks"] == 1


def test_older_version_than_acknowledged_is_lost(client: AckClient, image: Path):
    set_block(client, 5, issued=2, acked=2)
    set_block(client, 6, issued=2, acked=2)
    result = client.verify_file(image)
    assert result.exit_code == 1
    assert result.summary["lost_blocks"] == 2
    assert result.summary["lost_writes"] == 1


def test_interrupted_write_may_be_absent(client: AckClient, image: Path):
    for lba in range(10, 14):
        set_block(client, lba, issued=2, acked=1)
    set_slot(client, 2, 10, 4)
    result = client.verify_file(image)
    assert result.exit_code == 0
    assert result.summary["interrupted_writes"] == 1
    assert result.summary["interrupted_found"] == 0


def test_interrupted_write_that_is_there_in_part_is_torn(client: AckClient, image: Path):
    # An unmap: its content is easy to make.
    unmap = 2 | 1 << 63
    for lba in range(10, 14):
        set_block(client, lba, issued=unmap, acked=1)
    set_slot(client, unmap, 10, 4)
    patch(image, 10 * BLOCK, bytes(BLOCK))
    result = client.verify_file(image)
    assert result.exit_code == 1
    assert result.summary["torn_writes"] == 1
    patch(image, 10 * BLOCK, bytes(4 * BLOCK))
    assert client.verify_file(image).exit_code == 0


def test_what_was_found_counts_from_then_on(client: AckClient, image: Path):
    original = image.read_bytes()
    unmap = 2 | 1 << 63
    set_block(client, 10, issued=unmap, acked=1)
    set_slot(client, unmap, 10, 1)
    patch(image, 10 * BLOCK, bytes(BLOCK))
    assert client.verify_file(image).exit_code == 0
    image.write_bytes(original)
    assert client.verify_file(image).summary["lost_blocks"] == 1
