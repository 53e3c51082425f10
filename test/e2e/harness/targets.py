# SPDX-License-Identifier: BSD-3-Clause
"""Exports a bdev to clients in other processes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from .host import App
from .util import free_port

_HOST = "127.0.0.1"


class _ModePageCaching(ctypes.Structure):
    """The begin of libiscsi's `scsi_mode_page` with its `scsi_mode_page_caching`."""

    _fields_ = [
        ("next", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("ps", "spf", "page_code", "subpage_code", "len")),
        *((name, ctypes.c_int) for name in ("ic", "abpf", "cap", "disc", "size", "wce")),
    ]


class IscsiTarget:
    """An iSCSI target with one LUN. `number` tells several of one application apart."""

    def __init__(self, app: App, bdev: str, number: int = 1) -> None:
        self.port = free_port()
        self.iqn = f"iqn.2016-06.io.spdk:pcache{number}"
        rpc = app.rpc
        portals = [{"host": _HOST, "port": str(self.port)}]
        rpc.iscsi_create_portal_group(tag=number, portals=portals)
        rpc.iscsi_create_initiator_group(tag=number, initiators=["ANY"], netmasks=["ANY"])
        rpc.iscsi_create_target_node(
            name=self.iqn,
            alias_name=f"pcache{number}",
            pg_ig_maps=[{"pg_tag": number, "ig_tag": number}],
            luns=[{"bdev_name": bdev, "lun_id": 0}],
            queue_depth=64,
            disable_chap=True,
        )

    @property
    def url(self) -> str:
        """For an initiator."""
        return f"iscsi://{_HOST}:{self.port}/{self.iqn}/0"

    def reset_lun(self, count: int) -> None:
        """Has SPDK reset the bdev, so many times."""
        with self._session() as (libiscsi, session):
            for _ in range(count):
                assert libiscsi.iscsi_task_mgmt_lun_reset_sync(session, 0) == 0

    def has_write_cache(self) -> bool:
        """What the bdev tells its users."""
        caching, current = 8, 0
        with self._session() as (libiscsi, session):
            task = libiscsi.iscsi_modesense6_sync(session, 0, 0, current, caching, 0, 255)
            sense = libiscsi.scsi_datain_unmarshall(ctypes.c_void_p(task))
            page = libiscsi.scsi_modesense_get_page(ctypes.c_void_p(sense), caching, 0)
            found = _ModePageCaching.from_address(page).wce != 0
            libiscsi.scsi_free_scsi_task(ctypes.c_void_p(task))
        return found

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[ctypes.CDLL, ctypes.c_void_p]]:
        """libiscsi, and a session of it."""
        libiscsi = ctypes.CDLL("libiscsi.so.7")
        for function in (
            libiscsi.iscsi_create_context,
            libiscsi.iscsi_modesense6_sync,
            libiscsi.scsi_datain_unmarshall,
            libiscsi.scsi_modesense_get_page,
        ):
            function.restype = ctypes.c_void_p
        session = ctypes.c_void_p(libiscsi.iscsi_create_context(b"iqn.2016-06.io.spdk:tester"))
        libiscsi.iscsi_set_session_type(session, 2)
        libiscsi.iscsi_set_targetname(session, self.iqn.encode())
        portal = f"{_HOST}:{self.port}".encode()
        assert libiscsi.iscsi_full_connect_sync(session, portal, 0) == 0
        try:
            yield libiscsi, session
        finally:
            libiscsi.iscsi_logout_sync(session)
            libiscsi.iscsi_destroy_context(session)


class NvmfTarget:
    """An NVMe-oF/TCP subsystem with one namespace."""

    NQN = "nqn.2016-06.io.spdk:pcache"

    def __init__(self, app: App, bdev: str, *, zcopy: bool = False) -> None:
        self.port = free_port()
        rpc = app.rpc
        # The default number of shared buffers takes half a gigabyte.
        rpc.nvmf_create_transport(trtype="TCP", num_shared_buffers=1023, zcopy=zcopy)
        rpc.nvmf_create_subsystem(nqn=self.NQN, allow_any_host=True, serial_number="PCACHE0")
        rpc.nvmf_subsystem_add_ns(nqn=self.NQN, namespace={"bdev_name": bdev})
        rpc.nvmf_subsystem_add_listener(nqn=self.NQN, listen_address=self._address())

    @property
    def url(self) -> str:
        """For the client."""
        return f"nvme+tcp://{_HOST}:{self.port}/{self.NQN}"

    def _address(self) -> dict[str, str]:
        return {
            "trtype": "TCP",
            "adrfam": "IPv4",
            "traddr": _HOST,
            "trsvcid": str(self.port),
        }

    def attach_config(self, name: str) -> dict[str, Any]:
        """The entry with which another SPDK application attaches it; its bdev is `name`n1."""
        params = {"name": name, "subnqn": self.NQN, **self._address()}
        return {"method": "bdev_nvme_attach_controller", "params": params}
