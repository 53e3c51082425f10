# SPDX-License-Identifier: BSD-3-Clause
"""bdevperf as a tool: start it with a configuration, run workloads on it, read its numbers."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .host import App, AppFailed, Host
from .rpc import RpcError


@dataclass(frozen=True)
class WorkloadResult:
    """The sums over all jobs of one workload."""

    iops: float
    mibps: float
    latency_us: float
    # Of the worst job.
    latency_us_median: float
    latency_us_p99: float
    latency_us_p999: float
    latency_us_p9999: float
    latency_us_max: float
    io_failed: int


class Bdevperf:
    """A bdevperf that waits for workloads.

    It runs on every bdev that nobody has claimed, so a cache keeps its base out of the way.
    """

    def __init__(
        self,
        host: Host,
        bdevs: list[dict[str, Any]],
        *,
        cores: int = 1,
        zero_copy: bool = False,
        zipf_theta: float = 0,
        jobs_file: Path | None = None,
        **options: Any,
    ) -> None:
        # -l: percentiles of the latency, in the log.
        arguments = ["-z", "-l", "-q", "1", "-o", "4096", "-w", "randread", "-t", "1"]
        if zero_copy:
            # Reads and writes of up to 64 KiB borrow the bdev's memory.
            arguments.append("-Z")
        if zipf_theta:
            arguments += ["-F", str(zipf_theta)]
        if jobs_file is not None:
            # What its jobs say goes before what a workload asks for.
            arguments += ["-j", str(jobs_file)]
        elif cores > 1:
            # Every core works on every bdev, instead of one core on each.
            arguments.append("-C")
        self.app: App = host.start("bdevperf", bdevs=bdevs, cores=cores, arguments=arguments, **options)

    def run(
        self, workload: str, *, io_size: int, queue_depth: int, seconds: int, read_percent: int = 0
    ) -> WorkloadResult:
        """Runs a workload; a failed I/O or a mismatch of a verify raises `AppFailed`."""
        params = _params(workload, io_size, queue_depth, seconds, read_percent)
        log_size = len(self.app.log())
        try:
            answer = self.app.rpc.call("perform_tests", params)
        except RpcError as error:
            raise AppFailed(f"{workload} {io_size}: {error}\n{self.app.log_tail()}") from error
        return self._result(f"{workload} {io_size}", answer["results"], log_size, "finished")

    def run_and_end(
        self, workload: str, *, io_size: int, queue_depth: int, seconds: float, at_end: Callable[[], None]
    ) -> WorkloadResult:
        """Runs a workload for less than a second, which is the least that bdevperf can be asked for: the
        application is told to end meanwhile. `at_end` is called just before."""
        params = _params(workload, io_size, queue_depth, math.ceil(seconds) + 1, 0)
        log_size = len(self.app.log())
        answer = self.app.rpc.begin("perform_tests", params)
        time.sleep(seconds)
        at_end()
        self.app.process.send_signal(signal.SIGINT)
        result = self._result(f"{workload} {io_size}", answer()["results"], log_size, "terminated")
        # Which no status says then.
        if result.io_failed:
            raise AppFailed(f"{workload} {io_size}: {result}\n{self.app.log_tail()}")
        return result

    def _result(self, what: str, jobs: list[dict[str, Any]], log_size: int, status: str) -> WorkloadResult:
        if not jobs or any(job["status"] != status for job in jobs):
            raise AppFailed(f"{what}: {jobs}\n{self.app.log_tail()}")
        iops = sum(job["iops"] for job in jobs)
        # It is flushed to the log before the answer is sent.
        log = self.app.log()[log_size:]
        return WorkloadResult(
            iops=iops,
            mibps=sum(job["mibps"] for job in jobs),
            latency_us=sum(job["avg_latency_us"] * job["iops"] for job in jobs) / max(iops, 1.0),
            latency_us_median=_percentile_us(log, "50.00000"),
            latency_us_p99=_percentile_us(log, "99.00000"),
            latency_us_p999=_percentile_us(log, "99.90000"),
            latency_us_p9999=_percentile_us(log, "99.99000"),
            latency_us_max=max(job["max_latency_us"] for job in jobs),
            io_failed=sum(job["io_failed"] for job in jobs),
        )

    def stop(self) -> None:
        """Ends it in good order."""
        self.app.stop()


def _params(workload: str, io_size: int, queue_depth: int, seconds: int, read_percent: int) -> dict[str, Any]:
    params: dict[str, Any] = {
        "workload_type": workload,
        # The RPC takes this one as a text.
        "io_size": str(io_size),
        "queue_depth": queue_depth,
        "time_in_sec": seconds,
    }
    if workload in ("rw", "randrw"):
        params["rw_percentage"] = read_percent
    return params


def _percentile_us(log: str, percent: str) -> float:
    """The upper end of the bucket of the histogram in which this share of the requests is reached."""
    found = re.findall(rf"^ *{re.escape(percent)}% : +([0-9.]+)us$", log, re.MULTILINE)
    if not found:
        raise AppFailed(f"bdevperf told no latency at {percent} %:\n{log[-2000:]}")
    return max(float(latency) for latency in found)
