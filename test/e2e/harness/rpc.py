# SPDX-License-Identifier: BSD-3-Clause
"""JSON-RPC to an SPDK application, through the published client."""

from __future__ import annotations

import contextlib
from typing import Any

from spdk.rpc.client import JSONRPCClient, JSONRPCException


class RpcError(Exception):
    """The application answered with an error."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"{method}: error {code}: {message}")
        self.method = method
        self.code = code
        self.message = message


class RpcConnectionLost(Exception):
    """The application is not there, or went away before it answered."""


class Rpc:
    """A connection to the RPC socket of one application. Parameters are keyword arguments."""

    def __init__(self, socket_path: str, timeout_s: float = 120.0) -> None:
        try:
            self._client = JSONRPCClient(socket_path, timeout=timeout_s)
        except JSONRPCException as error:
            raise RpcConnectionLost(str(error)) from error

    def call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """One call; an error answer becomes an `RpcError` with its code and message."""
        # Client.call() would wrap an error into one text; the tests look at code and message.
        try:
            self._client.send(method, params or {})
            answer = self._client.recv()
        except (JSONRPCException, OSError, AttributeError) as error:
            raise RpcConnectionLost(f"{method}: {error}") from error
        if "error" in answer:
            raise RpcError(method, answer["error"]["code"], answer["error"]["message"])
        return answer["result"]

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._client.close()

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda **params: self.call(method, params)
