"""The daemon's door: HTTP/1.1 over a Unix socket, turned into calls of `DaemonApi`.

Everything a client can do to us is bounded: connections, header and body sizes, and the time it may take over each.
A client that goes away cancels what it asked for. Knows nothing of what the operations do.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import trio

from mfs.control import listening, wire
from mfs.control.api import DaemonApi, Json
from mfs.control.http import ClientGone, HttpConnection, Limits, Request
from mfs.errors import (
    AccessError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
    from_wire,
)
from mfs.metrics.families import Text

log = logging.getLogger(__name__)
_SHUTDOWN_ANSWER_S = 5.0


@dataclass(frozen=True)
class ServerConfig:
    """Limits of the control server. The defaults are far above what people and scrapers need, far below harm."""

    socket_mode: int = 0o600
    """Permissions of the socket. Wider lets others read (status, ls, stat, config); changes stay with uid and root."""
    connections_max: int = 64
    """Connections at once; further ones wait in the socket's queue."""
    patience_s: float = 5.0
    """How long all places may be taken before those who wait are told 503 and closed."""
    operation_s: float = 600.0
    """An operation with one answer that takes longer is cancelled: refreshing the largest registry takes minutes."""
    limits: Limits = field(default_factory=Limits)


async def serve(
    api: DaemonApi,
    socket_path: Path,
    config: ServerConfig = ServerConfig(),
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. Started once the socket accepts connections; a file in its place is replaced.

    Raises: ConfigError if the socket cannot be made. A failing operation or client never ends the server.
    Cancellation: requests under way are cancelled, except that the answer to `shutdown` is still sent.
    """
    with listening.door(socket_path, config.socket_mode) as listener:
        task_status.started()
        await Server(api, config).run(listener)


class Server:
    """One door: its connections, and what is asked for on them.

    This one is a Unix socket's, and knows its clients by their uid. A door of another kind says by `identify` and
    `admit` who may do what, and by `answer_other` what else it has.
    """

    headers: tuple[tuple[str, str], ...] = ()
    """Of every response."""

    def __init__(self, api: DaemonApi, config: ServerConfig) -> None:
        self._api = api
        self._config = config
        self._places = trio.Semaphore(config.connections_max)
        self._full_since_s: float | None = None

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Answer who connects, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                has_place = await self.wait_place()
                stream = trio.SocketStream(await listening.accept(listener))
                has_place = has_place or self.take_place_nowait()
                nursery.start_soon(self.handle_connection if has_place else self.refuse_connection, stream)

    def identify(self, stream: trio.SocketStream) -> int:
        """Who is on the other side, for `admit`."""
        return listening.peer_uid(stream.socket)

    def admit(self, request: Request, name: str, operation: wire.Operation, who: int) -> None:
        """Raises: AccessError if this operation is not for them."""
        if operation.changes and who not in (0, os.geteuid()):
            raise AccessError(
                f"uid {who} may not {name} here: only root and uid {os.geteuid()}, who mounted, may change things"
            )

    async def answer_other(self, connection: HttpConnection, request: Request) -> bool:
        """Answer what is no operation; False if it is one, or nothing. Raises: MfsError."""
        return False

    async def wait_place(self) -> bool:
        """Take a place for one more connection; False if there was none for so long that a client must be told."""
        if self.take_place_nowait():
            return True
        if self._full_since_s is None:
            self._full_since_s = trio.current_time()
        with trio.move_on_at(self._full_since_s + self._config.patience_s):
            await self._places.acquire()
            self._full_since_s = None
            return True
        return False

    def take_place_nowait(self) -> bool:
        """Take a place, if there is one."""
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            return False
        self._full_since_s = None
        return True

    async def refuse_connection(self, stream: trio.SocketStream) -> None:
        """Say that all places are taken. Never raises but Cancelled."""
        busy = TransientStoreError(f"{self._config.connections_max} control connections are open: try later")
        try:
            async with stream:
                await HttpConnection(stream, self._config.limits, self.headers).refuse(busy)
        except (ClientGone, trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def handle_connection(self, stream: trio.SocketStream) -> None:
        """Answer one client until it closes, breaks the protocol or is too slow. Never raises but Cancelled.

        Gives its place back.
        """
        connection = HttpConnection(stream, self._config.limits, self.headers)
        try:
            async with stream:
                who = self.identify(stream)
                while await self._handle_request(connection, who):
                    pass
        except (ClientGone, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Exception:
            log.exception("control connection failed")
        finally:
            self._places.release()

    async def _handle_request(self, connection: HttpConnection, who: int) -> bool:
        """One request and its response. Returns whether another may follow on this connection."""
        try:
            request = await connection.receive_request()
            if request is None:
                return False
            if await self.answer_other(connection, request):
                return connection.can_continue()
            name, operation = _route(request.target)
            if request.method != operation.method:
                raise UsageError(f"{name} is asked for with {operation.method}, not {request.method}")
            self.admit(request, name, operation, who)
            arguments = wire.parse_arguments(operation, _values(request.target, request.body))
        except MfsError as error:
            await connection.refuse(error)
            return connection.can_continue()
        method = getattr(self._api, name)
        if operation.streams:
            await self._stream(connection, method(**arguments))
        elif name == "shutdown":
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _SHUTDOWN_ANSWER_S):
                await connection.send_json(200, await self._api.shutdown())
        else:
            if operation.says_text:
                arguments["accept"] = request.accept
            await self._answer(connection, method, arguments)
        return connection.can_continue()

    async def _answer(self, connection: HttpConnection, method: Any, arguments: dict[str, Any]) -> None:
        """Run an operation with one answer; stop it when the client goes."""
        result: Json | Text | MfsError = TransientStoreError(f"no answer after {self._config.operation_s:g} s: gave up")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.cancel_when_gone, nursery.cancel_scope)
            with trio.move_on_after(self._config.operation_s):
                try:
                    result = await method(**arguments)
                except Exception as error:
                    result = _as_mfs_error(error)
            nursery.cancel_scope.cancel()
        connection.raise_if_gone()
        if isinstance(result, MfsError):
            await connection.refuse(result)
        elif isinstance(result, Text):
            await connection.send_whole(200, *result)
        else:
            await connection.send_json(200, result)

    async def _stream(self, connection: HttpConnection, items: AsyncIterator[Json]) -> None:
        """Send the items of an operation as they come; stop it when the client goes.

        One task iterates, another writes: an async generator must not be cancelled in the middle of a step merely
        because it is time for a sign of life.
        """
        send, receive = trio.open_memory_channel[Json](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.cancel_when_gone, nursery.cancel_scope)
            nursery.start_soon(_produce, items, send)
            try:
                await _write_lines(connection, receive)
            except (ClientGone, trio.BrokenResourceError, trio.ClosedResourceError):
                connection.mark_gone()
            nursery.cancel_scope.cancel()
        connection.raise_if_gone()


async def _produce(items: AsyncIterator[Json], send: trio.MemorySendChannel[Json]) -> None:
    """Pass the items on; an error becomes the last one."""
    async with send, aclosing(cast("Any", items)):
        try:
            async for item in items:
                await send.send(item)
        except trio.BrokenResourceError:  # the client has gone, and the writing task with it
            return
        except Exception as error:
            await send.send(wire.error_body(_as_mfs_error(error)))


async def _write_lines(connection: HttpConnection, receive: trio.MemoryReceiveChannel[Json]) -> None:
    """Write each item as a line, and a blank line where none comes for a while."""
    started = False
    async with receive:
        while True:
            item: Json | None = None
            with trio.move_on_after(wire.HEARTBEAT_S):
                try:
                    item = await receive.receive()
                except trio.EndOfChannel:
                    break
            if not started and item is not None and "error" in item:  # nothing sent yet: the status can still say it
                await connection.refuse(from_wire(item["error"]["type"], item["error"]["message"]))
                return
            if not started:
                await connection.start_stream()
                started = True
            await connection.send_line(b"" if item is None else json.dumps(item).encode())
    if not started:
        await connection.start_stream()
    await connection.end()


def _as_mfs_error(error: Exception) -> MfsError:
    if isinstance(error, MfsError):
        return error
    log.error("control operation failed unexpectedly", exc_info=error)
    return StoreError(f"internal error, see the daemon's log: {type(error).__name__}: {error}")


def _route(target: str) -> tuple[str, wire.Operation]:
    path = target.partition("?")[0]
    name = path.removeprefix(wire.PREFIX)
    if not path.startswith(wire.PREFIX) or name not in wire.OPERATIONS:
        raise NotFoundError(
            f"no control operation at {path}: expected {wire.PREFIX} and one of {', '.join(wire.OPERATIONS)}"
        )
    return name, wire.OPERATIONS[name]


def _values(target: str, body: bytes) -> dict[str, Any]:
    """The arguments as sent: from the query and from the JSON body."""
    query = parse_qsl(target.partition("?")[2], keep_blank_values=True, errors="surrogateescape")
    values: dict[str, Any] = dict(query)
    if body:
        values |= wire.parse_object(body)
    return values
