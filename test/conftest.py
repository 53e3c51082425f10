# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: the machine with SPDK on it, a folder for media, a seed. All are cleaned up after."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import ROOT, AckClient, Hold, Host, Rpc
from harness.paths import MODULE

LOG_FOLDER = ROOT / "target/test-logs"
_LOG_LINES_SHOWN = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pcache")
    group.addoption("--kill-rounds", type=int, default=20, help="rounds of the SIGKILL loop")
    group.addoption("--no-huge", action="store_true", help="use no hugepages even if there are some")
    group.addoption("--seed", type=int, default=None, help="of the random tests; default: a new one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        config.option.seed = random.SystemRandom().randrange(1 << 32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"pcache: --seed={config.getoption('--seed')}, logs of failed tests in {LOG_FOLDER}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Keeps what the applications printed when a test fails, and shows the end of it."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and host is not None:
        folder = LOG_FOLDER / item.name.replace("/", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in host.logs().items():
            (folder / f"{name}.log").write_text(text)
            tail = "\n".join(text.splitlines()[-_LOG_LINES_SHOWN:])
            report.sections.append((f"log of {name} ({folder})", tail))
    return report


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Iterator[Host]:
    """One for all tests."""
    with Host(hugepages=not request.config.getoption("--no-huge")) as machine:
        if not machine.spdk.shared:
            pytest.skip("SPDK is built static: there are no applications to preload the module into")
        if not machine.module.exists():
            pytest.exit(f"{MODULE} is missing: run 'make module' first", returncode=3)
        yield machine


@pytest.fixture
def host(machine: Host) -> Iterator[Host]:
    """To start applications with; they are ended after the test, whatever happened."""
    yield machine
    machine.forget_ended()


@pytest.fixture
def need_app(host: Host):
    """Skips a test for an application that this SPDK does not have (an installed one lacks some)."""

    def need(name: str) -> None:
        if host.spdk.app(name) is None:
            pytest.skip(f"this SPDK has no {name}")

    return need


@pytest.fixture
def media() -> Iterator[Path]:
    """A folder in memory for base and cache files."""
    folder = Path(tempfile.mkdtemp(prefix="pcache-media-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A random number that the header of the report tells, for repeating a run."""
    return request.config.getoption("--seed")


@pytest.fixture
def ended_client() -> Iterator[list[AckClient]]:
    """Clients put in here are ended with the test."""
    clients: list[AckClient] = []
    yield clients
    for client in clients:
        client.end()


@pytest.fixture
def meanwhile() -> Iterator[Callable[..., Future]]:
    """Has an application begin with a call, on a connection of its own, and lets the test go on."""
    with ThreadPoolExecutor() as pool:
        yield lambda app, method, **params: pool.submit(Rpc(app.socket_path).begin(method, params))


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """For applications that are started with its library `before_module`."""
    hold = Hold(tmp_path)
    for name, value in hold.environment.items():
        monkeypatch.setenv(name, value)
    yield hold
    for call in ("munmap", "madvise", "spdk_mem_register", "spdk_mem_unregister"):
        hold.let_go(call)


@pytest.fixture
def subtests_of_a_table():
    """Goes through a whole table of cases and fails at its end, with all that went wrong."""
    failures: list[str] = []

    @contextlib.contextmanager
    def case(what: str) -> Iterator[None]:
        try:
            yield
        # A missing exception is a BaseException of pytest's own.
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"{what}: {error}")

    yield case
    assert not failures, "\n".join([f"{len(failures)} cases failed:", *failures])


@pytest.fixture
def huge_file(request: pytest.FixtureRequest, host: Host) -> Iterator[Path]:
    """Where there is room for a cache of the module's `CACHE_MIB` on hugetlbfs."""
    cache_mib = request.module.CACHE_MIB
    with host.hugepages.more(cache_mib) as folder:
        if folder is None:
            pytest.skip("too few hugepages can be reserved")
        if host.hugepages.free_mib() < cache_mib + 512:
            pytest.skip("there are no hugepages for an application beside the cache")
        file = folder / "pcache-test"
        file.unlink(missing_ok=True)
        yield file
        host.end_all()
        file.unlink(missing_ok=True)
