# SPDX-License-Identifier: BSD-3-Clause
"""`make bench-trace` on a small made-up trace, whose figures are known; and what it says of a bad one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Host, NvmfTarget, replay
from harness.scenario import BASE, Storage

BENCHES = ROOT / "benches"
HEADER = "version,time,op,size,lbn"
# Of pages read, with what a cache that drops nothing makes of them.
REQUESTS = [
    ("2a", 65536, 0),
    ("28", 65536, 0),  # 16 hits
    ("28", 8192, 80000),  # 2 misses
    ("28", 8192, 80000),  # 2 hits
    ("28", 512, 160003),  # 1 miss, of a page that is not asked for as a whole
    (
        "28",
        204800,
        200001,
    ),  # 51 misses, in more than one command, from the middle of a page to that of another
]
HITS, PAGES = 18, 72
RATIOS = ["hit_ratio_spdk", "hit_ratio_engine", "lru", "fifo", "arc", "s3fifo"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    lines = [f"1,{number},{op},{size},{lbn}" for number, (op, size, lbn) in enumerate(REQUESTS)]
    file.write_text("\n".join([HEADER, *lines]) + "\n")
    return file


def bench_trace(**settings: str) -> subprocess.CompletedProcess:
    pytest.importorskip("libcachesim", reason="there is no simulator for this processor")
    environment = {name: text for name, text in os.environ.items() if name != "TRACE_PARTS"} | settings
    command = [sys.executable, BENCHES / "trace.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_last_line_tells_what_a_small_trace_must_give(host: Host, trace: Path):
    ended = bench_trace(TRACE=str(trace), CACHE_MIB="8")
    assert ended.returncode == 0, ended.stderr
    line = json.loads(ended.stdout.splitlines()[-1])
    assert set(line) == {"requests", "cache_mib", *RATIOS, "base_read_bytes", "base_write_bytes"}
    assert (line["requests"], line["cache_mib"]) == (len(REQUESTS), 8)
    assert {name: line[name] for name in RATIOS} == dict.fromkeys(RATIOS, round(HITS / PAGES, 6))
    # At least what was asked for and missing; all that was written.
    assert line["base_read_bytes"] >= 8192 + 512 + 204800
    assert line["base_write_bytes"] == 65536


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"CACHE_MIB": "7"}, "CACHE_MIB is '7'; it must be a number of MiB from 8"),
        ({"CACHE_MIB": "many"}, "CACHE_MIB is 'many'"),
        ({"CACHE_MIB": "16777216"}, "are free"),
        ({"TRACE": ""}, "TRACE is missing"),
        ({"TRACE": "/no/such/trace"}, "/no/such/trace cannot be read"),
        ({"TRACE_PARTS": "all"}, "TRACE_PARTS is 'all'; it must be"),
    ],
)
def test_bad_settings_are_refused(trace: Path, settings: dict[str, str], complaint: str):
    ended = bench_trace(**{"TRACE": str(trace), "CACHE_MIB": "8", **settings})
    assert ended.returncode == 2, ended.stderr
    assert complaint in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1,2,28,512", "has 4 values; it must have 5: version,time,op,size,lbn"),
        ("1,2,35,512,0", "op is '35'; it must be 28 (read) or 2a (write)"),
        ("1,2,28,513,0", "size is '513'; it must be a multiple of 512"),
        ("1,2,28,0,0", "size is '0'"),
        ("1,2,28,512,-8", "lbn is '-8'; it must be a number"),
        ("1,now,28,512,0", "time is 'now'"),
        ("1,2,28,512,137438953472", "lbn is '137438953472'; the base has 64 TiB at most"),
        ("", "'' has 1 values"),
    ],
)
def test_malformed_line_is_named(trace: Path, line: str, complaint: str):
    with trace.open("a") as file:
        file.write(f"{line}\n1,9,28,512,0\n")
    ended = bench_trace(TRACE=str(trace), CACHE_MIB="8")
    assert ended.returncode == 2
    assert f"{trace}:{len(REQUESTS) + 2}: " in ended.stderr
    assert complaint in ended.stderr


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("read 262143 2", "blocks 262143 to 262144; the device has 262144"),
        ("write 0 257", "257 blocks; a request has 1 to 256"),
        ("unmap 0 8", "not 'read LBA LEN' or 'write LBA LEN'"),
    ],
)
def test_client_refuses_what_the_device_does_not_have(host: Host, media: Path, command: str, complaint: str):
    storage = Storage(media)
    app = host.start("nvmf_tgt", bdevs=[storage.malloc_base()])
    commands = media / "commands"
    commands.write_text(f"write 262143 1\n{command}\n")
    result = replay(NvmfTarget(app, BASE).url, commands, timeout_s=30)
    assert result.exit_code == 2
    assert f"{commands}:2: " in result.complaints
    assert complaint in result.complaints
