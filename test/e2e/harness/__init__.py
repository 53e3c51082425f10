# SPDX-License-Identifier: BSD-3-Clause
"""What the end-to-end tests and the demo need to run unmodified SPDK applications with pcache."""

from .ackclient import AckClient, ClientResult, replay
from .bdevperf import Bdevperf, WorkloadResult
from .hold import Hold
from .host import App, AppFailed, Host
from .paths import ROOT
from .preload import build_preload
from .rpc import Rpc, RpcConnectionLost, RpcError
from .targets import IscsiTarget, NvmfTarget
from .util import free_port, wait_until

__all__ = [
    "ROOT",
    "AckClient",
    "App",
    "AppFailed",
    "Bdevperf",
    "ClientResult",
    "Hold",
    "Host",
    "IscsiTarget",
    "NvmfTarget",
    "Rpc",
    "RpcConnectionLost",
    "RpcError",
    "WorkloadResult",
    "build_preload",
    "free_port",
    "replay",
    "wait_until",
]
