"""One HTTP/1.1 connection as the control server sees it: h11 on a trio stream, with limits and deadlines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h11
import trio

from mfs.control import wire
from mfs.errors import MfsError, UsageError


@dataclass(frozen=True)
class Limits:
    """What a client may cost."""

    header_bytes: int = 32 << 10
    """Request line and headers: a path of 4096 bytes, quoted, fits twice."""
    body_bytes: int = 4 << 20
    """A request's body: some ten thousand paths."""
    idle_s: float = 60.0
    """A connection may wait this long before its next request begins."""
    request_s: float = 10.0
    """From a request's first byte to its last."""
    send_s: float = 30.0
    """A client that takes none of what we send for this long is dropped."""


@dataclass(frozen=True)
class Request:
    """One request, received whole."""

    method: str
    target: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    """(name in lower case, value)."""

    @property
    def accept(self) -> str:
        """The header of that name, which may stand there several times; '' without."""
        return ",".join(value for key, value in self.headers if key == "accept")

    def header(self, name: str) -> str | None:
        """The value of a header, None if it is not there. name: in lower case. Raises: UsageError if it is there twice:
        two who read the request could each believe another one.
        """
        values = [value for key, value in self.headers if key == name]
        if len(values) > 1:
            raise UsageError(f"the header {name} is there {len(values)} times: expected one")
        return values[0] if values else None


class ClientGone(Exception):
    """The client closed, broke off or was too slow: there is nobody to answer."""


class HttpConnection:
    """Receives requests and sends responses; not for concurrent use, but for `cancel_when_gone` beside an operation."""

    def __init__(self, stream: trio.SocketStream, limits: Limits, headers: Sequence[tuple[str, str]] = ()) -> None:
        """headers: of every response."""
        self._headers = list(headers)
        self._stream = stream
        self._limits = limits
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._early: list[bytes] = []
        self._gone = False
        self._is_head = False

    async def receive_request(self) -> Request | None:
        """The next request, or None if the client closed in between or idled too long.

        Raises: UsageError for anything that is no request within the limits; ClientGone if it broke off within one.
        """
        if not self._h11.trailing_data[0]:  # else h11 holds the beginning already
            with trio.move_on_after(self._limits.idle_s) as idle:
                await self._receive_more()
            if idle.cancelled_caught:
                return None
        with trio.move_on_after(self._limits.request_s):
            return await self._receive_whole()
        raise UsageError(f"request not complete after {self._limits.request_s:g} s")

    async def _receive_whole(self) -> Request | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise UsageError(f"not an HTTP request within the limits: {error}") from error
            if event is h11.NEED_DATA:
                if self._h11.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                await self._receive_more()
            elif isinstance(event, h11.ConnectionClosed):
                if head is not None:
                    raise ClientGone
                return None
            elif isinstance(event, h11.Request):
                head = event
                self._is_head = event.method == b"HEAD"
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._limits.body_bytes:
                    raise UsageError(f"the request's body is longer than {self._limits.body_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in head.headers)
                return Request(head.method.decode("ascii"), head.target.decode("ascii"), bytes(body), headers)

    async def _receive_more(self) -> None:
        data = self._early.pop(0) if self._early else await self._stream.receive_some(16 << 10)
        try:
            self._h11.receive_data(data)
        except h11.RemoteProtocolError as error:  # bytes after the client had said that it closes
            raise ClientGone from error

    async def cancel_when_gone(self, scope: trio.CancelScope) -> None:
        """Run beside an operation: cancel it once the client closes its side. Early bytes are kept for later.

        A client that only shuts down its sending side counts as gone: nobody does that on purpose over HTTP.
        """
        while True:
            try:
                data = await self._stream.receive_some(16 << 10)
            except trio.BrokenResourceError:
                data = b""
            if not data or sum(map(len, self._early)) > self._limits.header_bytes:
                self._gone = True
                scope.cancel()
                return
            self._early.append(data)

    def mark_gone(self) -> None:
        self._gone = True

    def raise_if_gone(self) -> None:
        if self._gone:
            raise ClientGone

    def can_continue(self) -> bool:
        """Get ready for the next request; False if this connection must be closed."""
        if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            return False
        self._h11.start_next_cycle()
        return True

    async def send_json(self, status: int, value: Any) -> None:
        """A whole response."""
        await self.send_whole(status, "application/json", json.dumps(value).encode() + b"\n")

    async def send_whole(self, status: int, content_type: str, body: bytes) -> None:
        """A whole response of any kind."""
        headers = [*self._headers, ("Content-Type", content_type), ("Content-Length", str(len(body)))]
        await self._send(h11.Response(status_code=status, headers=headers))
        if not self._is_head:
            await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def refuse(self, error: MfsError) -> None:
        """An error as a whole response."""
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self.send_json(wire.http_status(error), wire.error_body(error))

    async def start_stream(self) -> None:
        headers = [*self._headers, ("Content-Type", wire.STREAM_TYPE)]
        await self._send(h11.Response(status_code=200, headers=headers))

    async def send_line(self, line: bytes) -> None:
        await self._send(h11.Data(data=line + b"\n"))

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    async def _send(self, event: Any) -> None:
        """Raises: ClientGone if the client does not take it in time."""
        data = self._h11.send(event)
        if not data:
            return
        with trio.move_on_after(self._limits.send_s):
            await self._stream.send_all(data)
            return
        raise ClientGone
