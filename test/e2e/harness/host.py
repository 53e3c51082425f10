# SPDX-License-Identifier: BSD-3-Clause
"""Starts SPDK applications with pcache preloaded, and ends every one of them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .memory import APP_COUNT, APP_MIB, Hugepages
from .paths import MODULE, Spdk
from .rpc import Rpc, RpcConnectionLost
from .util import core_mask, wait_until

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0
_PR_SET_PDEATHSIG = 1

# The defaults (128 sessions) take half a gigabyte in each application.
SMALL_ISCSI = {
    "subsystem": "iscsi",
    "config": [
        {
            "method": "iscsi_set_options",
            "params": {
                "max_sessions": 4,
                "max_connections_per_session": 1,
                "max_queue_depth": 64,
                "pdu_pool_size": 4096,
                "immediate_data_pool_size": 512,
                "data_out_pool_size": 512,
            },
        }
    ],
}


class AppFailed(Exception):
    """An application ended when it should not have, or did not start."""


def _die_with_parent() -> None:
    """Runs in the child: should the test runner be killed, its applications end as well."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class App:
    """One running SPDK application."""

    def __init__(self, host: Host, name: str, process: subprocess.Popen, workdir: Path) -> None:
        self._host = host
        self.name = name
        self.process = process
        self.workdir = workdir
        self.socket_path = str(workdir / "rpc.sock")
        self.log_path = workdir / "log"
        self._rpc: Rpc | None = None

    @property
    def rpc(self) -> Rpc:
        """The connection to its RPC socket, opened at the first use."""
        if self._rpc is None:
            self._rpc = Rpc(self.socket_path)
        return self._rpc

    @property
    def running(self) -> bool:
        """Has it not ended yet?"""
        return self.process.poll() is None

    def log(self) -> str:
        """All that it printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log().splitlines()[-lines:])

    def wait_ready(self) -> None:
        """Until all subsystems and the configuration are up."""
        wait_until(self._accepts_rpc, f"{self.name} opens its RPC socket", _START_TIMEOUT_S)
        try:
            self.rpc.framework_wait_init()
        except RpcConnectionLost:
            self.process.wait(_STOP_TIMEOUT_S)
            raise AppFailed(
                f"{self.name} ended while it started, status {self.process.returncode}:\n{self.log_tail()}"
            ) from None

    def _accepts_rpc(self) -> bool:
        if not self.running:
            raise AppFailed(
                f"{self.name} ended at its start, status {self.process.returncode}:\n{self.log_tail()}"
            )
        try:
            return self.rpc is not None
        except RpcConnectionLost:
            return False

    def kill(self) -> None:
        """SIGKILL: it gets no chance to write anything."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_STOP_TIMEOUT_S)
        self._forget()

    def stop(self) -> None:
        """SIGTERM, and it must end well by itself."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AppFailed(f"{self.name} did not end at SIGTERM:\n{self.log_tail()}") from None
        self._forget()
        if status != 0:
            raise AppFailed(f"{self.name} ended with status {status}:\n{self.log_tail()}")

    def _forget(self) -> None:
        if self._rpc is not None:
            self._rpc.close()
            self._rpc = None
        self._host.hugepages.remove_leftovers(self.process.pid)


class Host:
    """This machine, as a place to run applications on. Use it as a context manager."""

    def __init__(
        self,
        *,
        hugepages: bool = True,
        module: Path = MODULE,
        app_mib: int = APP_MIB,
        app_count: int = APP_COUNT,
    ) -> None:
        self.spdk = Spdk.find()
        self.module = module
        self.hugepages = Hugepages(hugepages, app_mib, app_count)
        self._apps: list[App] = []
        # Unix socket paths are short (108 bytes), pytest's folders are not.
        self._tmp = tempfile.TemporaryDirectory(prefix="pcache-")
        self._count = 0

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()
        self.hugepages.release()
        self._tmp.cleanup()

    def environment(self, preload: bool = True, before_module: Path | None = None) -> dict[str, str]:
        """For an SPDK application. Never for a shell or a wrapper: the module needs SPDK's symbols."""
        env = dict(os.environ, LD_LIBRARY_PATH=self.spdk.library_path())
        env.pop("LD_PRELOAD", None)
        if preload:
            libraries = [self.module] if before_module is None else [before_module, self.module]
            env["LD_PRELOAD"] = ":".join(str(library) for library in libraries)
        return env

    def launch(
        self,
        name: str,
        *,
        bdevs: list[dict[str, Any]] | None = None,
        config_file: Path | None = None,
        cores: int = 1,
        first_core: int = 0,
        arguments: list[str] | None = None,
        preload: bool = True,
        hugepages: bool = True,
        pci: bool = False,
        binary: Path | None = None,
        before_module: Path | None = None,
    ) -> App:
        """Starts an application and does not wait for it.

        `pci`: SPDK knows addresses that devices can use, whether there are devices or not.
        `binary`: one that is not SPDK's own; `before_module`: a library that changes what the module finds.
        """
        binary = binary or self.spdk.app(name)
        if binary is None:
            raise FileNotFoundError(f"this SPDK has no {name}")
        self._count += 1
        workdir = Path(self._tmp.name) / f"{self._count}-{name}"
        workdir.mkdir()
        if config_file is None:
            config_file = workdir / "config.json"
            config_file.write_text(json.dumps(_config(bdevs, name), indent=2))
        memory = self.hugepages.arguments() if hugepages else Hugepages(False).arguments()
        command = [str(binary), "-m", core_mask(cores, first_core), "--json", str(config_file)]
        command += ["-r", str(workdir / "rpc.sock"), *memory, *(arguments or [])]
        # The addresses of virtual memory are of use to devices behind an IOMMU alone.
        command += ["--iova-mode", "pa"] if pci else ["--no-pci"]
        # The lock files of the cores would forbid two applications on one core.
        command += ["--disable-cpumask-locks"]
        with (workdir / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environment(preload, before_module),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        app = App(self, name, process, workdir)
        self._apps.append(app)
        return app

    def start(self, name: str = "spdk_tgt", **options: Any) -> App:
        """Starts an application and waits until it is ready."""
        app = self.launch(name, **options)
        app.wait_ready()
        return app

    def end_all(self) -> None:
        """Kills what still runs. SIGKILL, since a hung application is what must not stay."""
        for app in self._apps:
            if app.running:
                app.kill()

    def forget_ended(self) -> None:
        """Between tests: their applications are over, their logs are of no use any more."""
        self.end_all()
        self._apps.clear()

    def logs(self) -> dict[str, str]:
        """What the applications of the current test printed."""
        return {f"{app.workdir.name}": app.log() for app in self._apps}


def _config(bdevs: list[dict[str, Any]] | None, name: str) -> dict[str, Any]:
    """A configuration file. `bdevs` are {"method": ..., "params": ...} of the bdev subsystem."""
    subsystems: list[dict[str, Any]] = []
    if bdevs:
        subsystems.append({"subsystem": "bdev", "config": bdevs})
    if name in ("spdk_tgt", "iscsi_tgt"):
        subsystems.append(SMALL_ISCSI)
    return {"subsystems": subsystems}
