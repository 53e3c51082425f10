# SPDX-License-Identifier: BSD-3-Clause
"""JSON-RPC to an SPDK application, through the published client."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
        self._answers: dict[int, dict[str, Any]] = {}

    def call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """One call; an error answer becomes an `RpcError` with its code and message."""
        # Client.call() would wrap an error into one text; the tests look at code and message.
        with _connected(method):
            answer = self._answer(self._client.send(method, params or {}))
        return _result(method, answer)

    def begin(self, method: str, params: dict[str, Any]) -> Callable[[], Any]:
        """Returns once the application has begun with a call; what is returned waits for its end."""
        with _connected(method):
            number = self._client.add_request(method, params)
            # It begins with the calls of a connection in their order, and answers this one at once.
            begun = self._client.add_request("spdk_get_version", {})
            self._client.flush()
            self._answer(begun)

        def end() -> Any:
            with _connected(method):
                answer = self._answer(number)
            return _result(method, answer)

        return end

    def call_at_once(self, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
        """Several calls in one piece: the application gets to the next one before it does anything else.

        What each answered, an error too, in the order of the calls.
        """
        ids = {self._client.add_request(method, params): method for method, params in calls}
        self._client.flush()
        return [_outcome(method, self._answer(number)) for number, method in ids.items()]

    def _answer(self, number: int) -> dict[str, Any]:
        """The answer to the call of this number; others may come before."""
        while number not in self._answers:
            answer = self._client.recv()
            self._answers[answer["id"]] = answer
        return self._answers.pop(number)

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._client.close()

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda **params: self.call(method, params)


@contextlib.contextmanager
def _connected(method: str) -> Iterator[None]:
    """Tells if the connection is lost."""
    try:
        yield
    except (JSONRPCException, OSError, AttributeError) as error:
        raise RpcConnectionLost(f"{method}: {error}") from error


def _result(method: str, answer: dict[str, Any]) -> Any:
    """What the application answered, unless that is an error."""
    outcome = _outcome(method, answer)
    if isinstance(outcome, RpcError):
        raise outcome
    return outcome


def _outcome(method: str, answer: dict[str, Any]) -> Any:
    """A result, or an `RpcError`."""
    if "error" in answer:
        return RpcError(method, answer["error"]["code"], answer["error"]["message"])
    return answer["result"]
