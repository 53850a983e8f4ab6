"""The other side of the daemon's door: `DaemonApi` as synchronous calls over its Unix socket, with deadlines.

Used by the shell commands and by gpuload. Standard library only, so that it is quick to import.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mfs.control import wire
from mfs.control.api import EvictTier, Json, Tier
from mfs.control.connecting import connect
from mfs.errors import AccessError, MfsError, StoreError, TransientStoreError, UsageError, from_wire

ANSWER_BYTES_MAX = 256 << 20
"""A listing of a million names; more is not an answer of ours."""
_LINE_BYTES_MAX = 16 << 20
_SILENCE_S = 6 * wire.HEARTBEAT_S
_LONG_S = 620.0  # just above ServerConfig.operation_s: the server's own message is the better one


class Client:
    """Calls of one daemon. Each call is its own connection, so threads may share a client.

    All methods raise the error that the daemon raised, or: StoreError if no daemon answers there,
    TransientStoreError if it does not answer in time, AccessError if the socket is not ours to use.
    """

    def __init__(self, socket_path: Path, *, timeout_s: float = 30.0) -> None:
        """timeout_s: for answers that need no origin; operations that may wait for one have longer deadlines."""
        self._path = socket_path
        self._timeout_s = timeout_s

    def status(self) -> Json:
        return self._object("status", {}, self._timeout_s)

    def config(self) -> Json:
        return self._object("config", {}, self._timeout_s)

    def metrics(self, accept: str = "text/plain") -> str:
        """What Prometheus is told; see `DaemonApi.metrics`."""
        connection = _Connection(self._path, self._timeout_s)
        try:
            with connection.translated():
                response = connection.ask("metrics", {}, accept=accept)
                body = response.read(ANSWER_BYTES_MAX + 1)
            if response.status != 200:
                _decode(response.status, body)
            return body.decode()
        finally:
            connection.close()

    def overview(self, *, sort: str = wire.SORTS[0], match: str = "", count: int = 100) -> Json:
        return self._object("overview", {"sort": sort, "match": match, "count": str(count)}, self._timeout_s)

    def heat(self, path: str) -> Json:
        return self._object("heat", {"path": path}, _LONG_S)

    def ls(self, path: str) -> list[Json]:
        rows: list[Json] = self._call("ls", {"path": path}, _LONG_S)
        return rows

    def stat(self, path: str) -> Json:
        return self._object("stat", {"path": path}, _LONG_S)

    def loads(self, path: str) -> Json:
        return self._object("loads", {"path": path}, self._timeout_s)

    def pin(self, paths: Sequence[str]) -> Json:
        return self._object("pin", {"paths": list(paths)}, _LONG_S)

    def unpin(self, paths: Sequence[str]) -> Json:
        return self._object("unpin", {"paths": list(paths)}, _LONG_S)

    def evict(self, paths: Sequence[str], tier: EvictTier) -> Json:
        return self._object("evict", {"paths": list(paths), "tier": tier}, _LONG_S)

    def refresh(self) -> Json:
        return self._object("refresh", {}, _LONG_S)

    def shutdown(self) -> Json:
        return self._object("shutdown", {}, self._timeout_s)

    def prefetch(self, paths: Sequence[str], tier: Tier, *, wait: bool) -> Iterator[Json]:
        """Closing the iterator closes the connection, which cancels the work."""
        return self._stream("prefetch", {"paths": list(paths), "tier": tier, "wait": wait})

    def verify(self, paths: Sequence[str]) -> Iterator[Json]:
        """Closing the iterator closes the connection, which cancels the work."""
        return self._stream("verify", {"paths": list(paths)})

    def watch(self) -> Generator[Json, None, None]:
        """Closing the iterator closes the connection, which ends the watching."""
        return self._stream("watch", {})

    def _object(self, name: str, arguments: dict[str, Any], timeout_s: float) -> Json:
        value: Json = self._call(name, arguments, timeout_s)
        return value

    def _call(self, name: str, arguments: dict[str, Any], timeout_s: float) -> Any:
        connection = _Connection(self._path, timeout_s)
        try:
            with connection.translated():
                response = connection.ask(name, arguments)
                body = response.read(ANSWER_BYTES_MAX + 1)
            return _decode(response.status, body)
        finally:
            connection.close()

    def _stream(self, name: str, arguments: dict[str, Any]) -> Generator[Json, None, None]:
        connection = _Connection(self._path, _SILENCE_S)
        try:
            with connection.translated():
                response = connection.ask(name, arguments)
                if response.status != 200:
                    _decode(response.status, response.read(ANSWER_BYTES_MAX + 1))
            while True:
                with connection.translated():
                    line = response.readline(_LINE_BYTES_MAX + 1)
                if not line:
                    return
                if line.strip():
                    yield _decode(200, line)
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("mfs", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connect(self.sock, self._path, self._timeout_s)

    def ask(self, name: str, arguments: dict[str, Any], *, accept: str = "*/*") -> http.client.HTTPResponse:
        operation = wire.OPERATIONS[name]
        target, body = wire.PREFIX + name, None
        if operation.method == "GET":
            query = "&".join(f"{key}={quote(value, errors='surrogateescape')}" for key, value in arguments.items())
            target += f"?{query}" if query else ""
        else:
            body = json.dumps(arguments)
        try:
            self.request(operation.method, target, body, {"Accept": accept})
        except BrokenPipeError:  # refused before it had read everything: the answer says why
            pass
        return self.getresponse()

    def translated(self) -> _Translated:
        return _Translated(self._path)


class _Translated:
    """The one door through which errors of sockets and HTTP enter: they leave as mfs.errors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MfsError) or error is None:
            return
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise StoreError(f"no mfs daemon listens at {self._path}") from error
        if isinstance(error, PermissionError):
            raise AccessError(f"control socket {self._path}: permission denied; ask the user who mounted") from error
        if isinstance(error, TimeoutError):
            why = f": {error.strerror}" if error.strerror else ""
            raise TransientStoreError(f"the mfs daemon at {self._path} does not answer{why}") from error
        if isinstance(error, OSError | http.client.HTTPException):
            raise StoreError(
                f"the mfs daemon at {self._path} broke off: {error or type(error).__name__}; its log says more"
            ) from error


def _decode(status: int, body: bytes) -> Any:
    """The value in an answer. Raises: the error it describes."""
    if len(body) > ANSWER_BYTES_MAX:
        raise StoreError(f"the daemon's answer is longer than {ANSWER_BYTES_MAX} bytes")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"the daemon's answer is not JSON (HTTP status {status}): {error}") from error
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        fault = value["error"]
        raise from_wire(str(fault.get("type")), str(fault.get("message")))
    if status != 200:
        raise UsageError(f"the daemon answered with HTTP status {status}")
    return value
