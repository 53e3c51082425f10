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
        outcome = _outcome(method, answer)
        if isinstance(outcome, RpcError):
            raise outcome
        return outcome

    def call_at_once(self, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
        """Several calls in one piece: the application gets to the next one before it does anything else.

        What each answered, an error too, in the order of the calls.
        """
        ids = {self._client.add_request(method, params): method for method, params in calls}
        self._client.flush()
        answers = [self._client.recv() for _ in ids]
        by_id = {answer["id"]: answer for answer in answers}
        return [_outcome(method, by_id[number]) for number, method in ids.items()]

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._client.close()

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda **params: self.call(method, params)


def _outcome(method: str, answer: dict[str, Any]) -> Any:
    """A result, or an `RpcError`."""
    if "error" in answer:
        return RpcError(method, answer["error"]["code"], answer["error"]["message"])
    return answer["result"]
